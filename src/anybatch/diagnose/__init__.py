"""The experiments of "Understanding Batch Normalization" on any model, and what a small batch needs besides.

``ab.diagnose(model, loader, loss)`` runs them all; each is a module of its own: ``ab.diagnose.depth.measure(subject)``.
"""

import inspect
import sys
from types import ModuleType

from . import batch_noise as batch_noise
from . import cancellation as cancellation
from . import depth as depth
from . import diverging_step as diverging_step
from . import evaluation_gap as evaluation_gap
from . import gaussian_products as gaussian_products
from . import gradient_noise as gradient_noise
from . import history_error as history_error
from . import learning_rate as learning_rate
from . import logit_gradients as logit_gradients
from . import step_size as step_size
from . import weight_gradients as weight_gradients
from .advice import Advice as Advice
from .advice import advise as advise
from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import Progress as Progress
from .diagnosis import diagnose
from .experiments import EXPERIMENTS as EXPERIMENTS
from .findings import Finding as Finding
from .monitor import Monitor as Monitor
from .subject import Passes as Passes
from .subject import Subject as Subject


class _Diagnose(ModuleType):
    """The package, which can be called: its name is that of its main function."""

    __call__ = staticmethod(diagnose)


sys.modules[__name__].__class__ = _Diagnose
__signature__ = inspect.signature(diagnose)
__doc__ = f"{__doc__}\nab.diagnose{__signature__}:\n\n{diagnose.__doc__}"
