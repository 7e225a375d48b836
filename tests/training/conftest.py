"""What `train.py` is run with."""

from __future__ import annotations

import os

import pytest
from helpers import EXAMPLE

from dpo_kernels.training.small_model import make_small_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    model, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def environment(tmp_path):
    return os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
