"""DPO training of Hugging Face models; needs the extra `train` (transformers, accelerate, datasets)."""

from dpo_kernels.training.batch import PairCollator
from dpo_kernels.training.callbacks import NonFiniteError
from dpo_kernels.training.checkpoints import CheckpointError, SaveError
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import DataReport
from dpo_kernels.training.formats import ReadOptions
from dpo_kernels.training.loading import LoadError
from dpo_kernels.training.messages import DataError
from dpo_kernels.training.model import FusedHead
from dpo_kernels.training.output_head import HeadError
from dpo_kernels.training.ownership import FolderInUseError
from dpo_kernels.training.resume import DataChangedError
from dpo_kernels.training.trainer import DPOTrainer

__all__ = [
    "CheckpointError",
    "DPOConfig",
    "DPODataset",
    "DPOTrainer",
    "DataChangedError",
    "DataError",
    "DataReport",
    "FolderInUseError",
    "FusedHead",
    "HeadError",
    "LoadError",
    "NonFiniteError",
    "PairCollator",
    "ReadOptions",
    "SaveError",
]
