"""`dpo-kernels plan`: what the head of a model, or one of these sizes, takes; nothing is loaded or run."""

from __future__ import annotations

from typing import Any

from dpo_kernels.commands.endings import OptionError
from dpo_kernels.commands.simple import Parser

TEXT = "Prints mode, tiles, products and bytes of the head in forward and backward, of a model or by sizes."


def main(argv: list[str], program: str) -> int:
    """Prints a plan."""
    parser = Parser(program, TEXT)
    parser.add_argument("model", nargs="?", help="a model folder or hub name, whose config tells the sizes")
    parser.add_argument("--tokens", type=int, default=8192, help="whose label counts, at once; default: 8192")
    parser.add_argument("--hidden_size", type=int, help="features of a hidden state, where no model is given")
    parser.add_argument("--vocab_size", type=int, help="rows of the head's weight, where no model is given")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--grads", nargs="*", choices=("hidden", "weight", "bias", "low_rank"),
                        default=["hidden", "weight"],
                        help="what wants a gradient; none behind it: a reference or an evaluation")  # fmt: skip
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA on the head; default: none")
    parser.add_argument("--gradient_filter", type=float, help="a probability, such as 0.000244; see the train command")
    parser.add_argument("--memory_budget", help="such as 512MiB; default: 1GiB or more")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--impl", choices=("triton", "cpp", "torch"), help="default: the fastest that can run")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code run that the model brings")
    options = parser.parse_args(argv)
    given = [options.hidden_size, options.vocab_size]
    if None in given if options.model is None else given != [None, None]:
        raise OptionError("give a model, or --hidden_size and --vocab_size")
    hidden_size, vocab_size, softcap = _sizes(options) if options.model else (*given, None)
    import torch

    from dpo_kernels import available_impls, plan
    from dpo_kernels.commands.options import check_device
    from dpo_kernels.units import parse_bytes

    check_device(options.device)
    if options.impl is not None and (reason := available_impls(options.device)[options.impl]):
        raise OptionError(f"--impl {options.impl} cannot run on {options.device}: {reason}")
    print(plan(
        options.tokens, hidden_size, vocab_size, getattr(torch, options.dtype), grads=options.grads, softcap=softcap,
        memory_budget=parse_bytes(options.memory_budget), device=options.device, impl=options.impl,
        rank=options.rank, gradient_filter=options.gradient_filter,
    ))  # fmt: skip
    return 0


def _sizes(options: Any) -> tuple[int, int, float | None]:
    from dpo_kernels.training.loading import load_config

    config = load_config(options.model, options.trust_remote_code)
    text = config.get_text_config()
    return text.hidden_size, text.vocab_size, getattr(text, "final_logit_softcapping", None)
