"""The layers themselves, for building a model by hand."""

from .layers.cbn import CrossIterationBatchNorm as CrossIterationBatchNorm

__all__ = ["CrossIterationBatchNorm"]
