"""DPO training of Hugging Face models; needs the extra `train` (transformers, accelerate, datasets)."""

from dpo_kernels.training.callbacks import NonFiniteError
from dpo_kernels.training.chat import TemplateError
from dpo_kernels.training.data import DataError, DPODataset, PairCollator
from dpo_kernels.training.model import FusedHead, HeadError
from dpo_kernels.training.trainer import DPOConfig, DPOTrainer

__all__ = [
    "DPOConfig",
    "DPODataset",
    "DPOTrainer",
    "DataError",
    "FusedHead",
    "HeadError",
    "NonFiniteError",
    "PairCollator",
    "TemplateError",
]
