"""MMEngine: the methods in its registry of models, as ``norm_cfg`` asks for them, and the hook that they need.

    custom_imports = dict(imports=["anybatch.integrations.mmengine"])
    norm_cfg = dict(type="CBN")
    custom_hooks = [dict(type="AnybatchHook")]

Importing this module registers both. The names of norms in a model stay BatchNorm's (bn1), so checkpoints fit.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..convert import Report
from ..convert.snapshot import random_states_kept
from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..training import attach, history_state_dict, load_history_state_dict
from ..training.attach import Attached
from ._by_name import NAMES, build, pair_, waiting
from ._hosts import require

__all__ = ["AnybatchHook", "pair_"]

if TYPE_CHECKING:
    from mmengine.hooks import Hook
else:
    Hook = require("mmengine.hooks", "mmengine").Hook

_registry = require("mmengine.registry", "mmengine")
_is_model_wrapper = require("mmengine.model", "mmengine").is_model_wrapper

_KEY = "anybatch_history"  # in the checkpoint


class _ByName:
    """A class, as the registry wants it, whose instances are the method's layers."""

    _abbr_: ClassVar[str] = "bn"
    name: ClassVar[str]

    def __new__(cls, num_features: int, **options: Any) -> Any:
        return build(cls.name, num_features, **options)


for _name in NAMES:
    _registry.MODELS.register_module(_name, module=type(_name, (_ByName,), {"name": _name}))


@_registry.HOOKS.register_module()
class AnybatchHook(Hook):  # type: ignore[misc]
    """Pairs the norms built by name before training, tells them of the optimizer's steps, and saves their history.

    It serves a model that :func:`anybatch.convert_` converted before the runner got it too, for all but the first.

    Args:
        example_inputs: what one forward of the model takes, see :func:`anybatch.convert_`; by default the first
            example of the training set, as the model's ``train_step`` would give it to the model.

    Attributes:
        report: what pairing found, once it is done.
    """

    report: Report | None = None

    def __init__(self, example_inputs: Any = None) -> None:
        self.example_inputs = example_inputs
        self._saved: Any = None
        self._attached: list[Attached] = []

    def before_train(self, runner: Any) -> None:
        """Pair, attach, and go on from the history of the checkpoint that training is resumed from."""
        model = _bare(runner)
        if not any(isinstance(module, NormLayer) for module in model.modules()):
            raise AnybatchError(
                "AnybatchHook: the model has no norm of anybatch. Give norm_cfg=dict(type='CBN') or the like, leave "
                "out sync_bn, which rebuilds the norms, or drop the hook"
            )
        if waiting(model):
            inputs = _first_example(runner, model) if self.example_inputs is None else self.example_inputs
            self.report = pair_(model.train(), inputs)
            say = runner.logger.warning if self.report.unpaired else runner.logger.info
            say(f"AnybatchHook: the norms, and what feeds them\n{self.report}")
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if hasattr(wrapper, "values") else [wrapper]
        self._attached = [attach(model, each.optimizer, getattr(each, "loss_scaler", None)) for each in wrappers]
        if runner.iter and self._saved is not None:
            load_history_state_dict(model, self._saved)
        elif runner.iter:
            runner.logger.warning("AnybatchHook: the checkpoint has no history; the past is gathered anew")
        self._saved = None

    def after_train(self, runner: Any) -> None:
        """Take the hooks off the optimizers."""
        while self._attached:
            self._attached.pop().remove()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the history."""
        checkpoint[_KEY] = tree_map_only(Tensor, Tensor.cpu, history_state_dict(_bare(runner)))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the history until the norms are paired; weights alone (``load_from``) start without."""
        self._saved = checkpoint.get(_KEY)


def _bare(runner: Any) -> nn.Module:
    model: nn.Module = runner.model
    return model.module if _is_model_wrapper(model) else model  # type: ignore[return-value]


def _first_example(runner: Any, model: Any) -> tuple[Any, Any]:
    """Arguments of a forward for the loss, which runs what training runs; the loader itself is left alone."""
    loader = runner.train_dataloader
    try:
        with random_states_kept():
            example = loader.collate_fn([loader.dataset[0]])
        data = model.data_preprocessor(example, True)
    except Exception as error:
        raise AnybatchError(
            f"AnybatchHook: no first example of the training set to see the model run on ({type(error).__name__}: "
            f"{error}); give example_inputs, what one forward of the model takes"
        ) from error
    if isinstance(data, dict):
        return (), {**data, "mode": "loss"}
    return tuple(data) if isinstance(data, (list, tuple)) else (data,), {"mode": "loss"}
