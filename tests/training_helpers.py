"""A small model of any class, pairs for it, and a trainer of both."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import nn

from dpo_kernels.training import DPOConfig, DPOTrainer
from dpo_kernels.training.attention import use_branches

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
LOG2 = torch.tensor(2.0).log().item()


def make_model(name, options=(), dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | dict(options)))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.get_output_embeddings().parameters():
        nn.init.normal_(parameter, std=0.5)  # peaked, and a bias that is not 0
    return model.to(dtype).eval()


def batch():
    ids = torch.randint(3, 97, (3, 9))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, :4] = -100
    return ids, labels


class Pairs(torch.utils.data.Dataset):
    """Random pairs: answers of ragged length behind a prompt, as `DPODataset` gives them."""

    def __init__(self, count=8, length=14, vocab=97, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for _ in range(count):
            item = {}
            for side in ("chosen", "rejected"):
                ids = torch.randint(3, vocab, (length + 1,), generator=generator)
                first, last = 3, int(torch.randint(6, length + 1, (), generator=generator))
                mask = torch.zeros(length, dtype=torch.bool)
                mask[first:last] = True
                item[f"x_{side}"] = torch.where(torch.arange(length) < last, ids[:-1], 0)
                item[f"y_{side}"] = torch.where(mask, ids[1:], -100)
                item[f"mask_{side}"] = mask
            self.items.append(item)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


# (prompt, tokens of both that are equal, chosen, rejected): beyond windows, no prompt in common, an answer that is the
# other's beginning, a long prompt.
SIZES = ((21, 0, 30, 19), (0, 0, 9, 25), (12, 7, 0, 6), (40, 2, 5, 11))


class Trees(torch.utils.data.Dataset):
    """Pairs that begin alike. Some tokens of a prompt count, as earlier replies do."""

    def __init__(self, sizes=SIZES, vocab=97, width=64):
        draw = torch.Generator().manual_seed(0)
        self.items = []
        for prompt, alike, *answers in sizes:
            stem, item = torch.randint(5, vocab, (prompt + alike,), generator=draw), {}
            for side, count, start in zip(("chosen", "rejected"), answers, (3, 4), strict=True):
                own = torch.randint(5, vocab, (count + 1,), generator=draw)
                own[0] = start  # they part here
                ids, mask = torch.cat([stem, own]), torch.zeros(width, dtype=torch.bool)
                mask[max(prompt - 1, 0) : len(ids) - 1] = True
                mask[3 : prompt // 2] = prompt > 20
                x, y = (torch.nn.functional.pad(t, (0, width - len(t)), value=7) for t in (ids[:-1], ids[1:]))
                item |= {f"x_{side}": x, f"y_{side}": y.masked_fill(~mask, -100), f"mask_{side}": mask}
            self.items.append(item)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def make_trainer(tmp_path, name="Llama", options=(), pairs=None, eval_pairs=None, callbacks=None, **config):
    config = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no",
              "disable_tqdm": True, "use_cpu": True} | config  # fmt: skip
    args = DPOConfig(output_dir=str(tmp_path), **config)
    return DPOTrainer(
        make_model(name, options), make_model(name, options), args, pairs or Pairs(), eval_pairs, callbacks=callbacks
    )


def everything(trainer, batch, layout):
    """Losses and metrics of each pair, and every gradient, of a trainer's models in a layout."""
    trainer.layout = trainer.reference.layout = layout
    for model in filter(None, (trainer.model, trainer.ref_model)):
        use_branches(model, layout.attention == "branches")
    trainer.model.zero_grad()
    loss, metrics = trainer.compute_loss(trainer.model, batch.inputs, return_outputs=True)
    loss.backward()
    return metrics, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def logs(tmp_path, key="loss"):
    entries = [json.loads(line) for line in (Path(tmp_path) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if key in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
