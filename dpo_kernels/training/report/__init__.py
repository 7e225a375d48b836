"""What a run says, shows and leaves: a table at its start, sentences at its end, pictures, a page, a model card."""

from dpo_kernels.training.report.metrics import LOG_NAME, peak_memory_mib
from dpo_kernels.training.report.pictures import CURVES_NAME, LENGTHS_NAME, save_curves, save_lengths

__all__ = ["CURVES_NAME", "LENGTHS_NAME", "LOG_NAME", "peak_memory_mib", "save_curves", "save_lengths"]
