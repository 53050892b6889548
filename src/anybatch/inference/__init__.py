"""Models for inference: norms folded away, running statistics made exact, examples weighed."""

from .fold import fold as fold
from .fold import fold_weights as fold_weights
from .recalibrate import recalibrate_ as recalibrate_
from .weigh import ExampleWeights as ExampleWeights
from .weigh import tune_example_weight as tune_example_weight
from .weigh import weigh_examples_ as weigh_examples_

__all__ = ["ExampleWeights", "fold", "fold_weights", "recalibrate_", "tune_example_weight", "weigh_examples_"]
