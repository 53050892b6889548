"""The layers themselves, for building a model by hand."""

from .layers.accumulated import AccumulatedBatchNorm as AccumulatedBatchNorm
from .layers.batch_group import BatchAndGroupNorm as BatchAndGroupNorm
from .layers.bgn import BatchGroupNormalization as BatchGroupNormalization
from .layers.cbn import CrossIterationBatchNorm as CrossIterationBatchNorm
from .layers.ghost import GhostBatchNorm as GhostBatchNorm
from .layers.iebn import InstanceEnhancementBatchNorm as InstanceEnhancementBatchNorm
from .layers.iebn import InstanceEnhancementCrossIterationBatchNorm as InstanceEnhancementCrossIterationBatchNorm
from .layers.nonorm import NoNormalization as NoNormalization
from .layers.proxy import ProxyNormalization as ProxyNormalization
from .layers.renorm import BatchRenormalization as BatchRenormalization
from .layers.weighed import ExampleWeighedBatchNorm as ExampleWeighedBatchNorm

__all__ = [
    "AccumulatedBatchNorm",
    "BatchAndGroupNorm",
    "BatchGroupNormalization",
    "BatchRenormalization",
    "CrossIterationBatchNorm",
    "ExampleWeighedBatchNorm",
    "GhostBatchNorm",
    "InstanceEnhancementBatchNorm",
    "InstanceEnhancementCrossIterationBatchNorm",
    "NoNormalization",
    "ProxyNormalization",
]
