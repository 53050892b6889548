"""Models for inference: norms folded away, running statistics made exact."""

from .fold import fold, fold_weights
from .recalibrate import recalibrate_

__all__ = ["fold", "fold_weights", "recalibrate_"]
