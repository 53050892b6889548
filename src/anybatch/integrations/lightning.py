"""Lightning: a callback that converts the module, and keeps what training needs of it.

Trainer(callbacks=[Convert(ab.CBN(), example_inputs=images)])
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..convert import Report, convert_
from ..convert.eligible import Where, batch_norms
from ..errors import AnybatchError
from ..inference import recalibrate_
from ..layers.base import NormLayer
from ..layers.config import NormConfig
from ..training import attach
from ..training.attach import Attached
from ._histories import gather_histories, take_history
from ._hosts import require

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
else:
    Callback = require("lightning.pytorch", "lightning").Callback
    rank_zero_info = require("lightning.pytorch.utilities", "lightning").rank_zero_info
    rank_zero_warn = require("lightning.pytorch.utilities", "lightning").rank_zero_warn

__all__ = ["Convert"]

_KEY = "anybatch_histories"  # in the checkpoint
_DONE = "_anybatch_converted"  # on the module: what it was converted to, so that no later stage does it again


class Convert(Callback):
    """Converts the module's norms before its optimizers are made, and keeps their history in the checkpoints.

    The module is converted once, in the first stage that it goes through, whichever that is: a method may evaluate
    otherwise than BatchNorm. In ``fit`` the layers are told when the optimizers step, and by how much a float16 loss is
    scaled. A checkpoint holds the histories of all processes; ``fit`` resumed from it goes on bit for bit.

    Args:
        config: the method, such as ``ab.CBN()``. None: the module converts itself, at the end of its
            ``configure_model``.
        example_inputs: what one forward of the module takes, see :func:`anybatch.convert_`; by default the module's
            ``example_input_array``.
        where: which norms, see :func:`anybatch.convert_`; all by default.
        recalibrate: at the end of training, set the running statistics to those of the training data, in one pass
            over the training loader. Checkpoints written before that have the ones of training.
        forward: how the module runs on a batch then, see :func:`anybatch.recalibrate_`.

    Attributes:
        report: what the conversion did, once it is done.

    Raises:
        AnybatchError: in the first stage, as :func:`anybatch.convert_` does, and where there are no example inputs or
            no norm yet; in ``fit``, where the trainer or an optimizer made before spoils the conversion.
    """

    report: Report | None = None

    def __init__(
        self,
        config: NormConfig | None,
        example_inputs: Any = None,
        where: Where = None,
        recalibrate: bool = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if config is not None and not isinstance(config, NormConfig):
            raise AnybatchError(f"Convert: the config is {config!r}; give an instance such as ab.CBN(), or None")
        self.config = config
        self.example_inputs = example_inputs
        self.where = where
        self.recalibrate = recalibrate
        self.forward = forward
        self._attached: Attached | None = None

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Convert: the module is not wrapped yet, and in ``fit`` has no optimizers yet."""
        done = pl_module.__dict__.setdefault(_DONE, [])
        if self.config is None or (self.config, self.where) in done:
            return
        inputs = pl_module.example_input_array if self.example_inputs is None else self.example_inputs
        if self.config.needs_example and inputs is None:
            raise AnybatchError(
                f"Convert: {type(self.config).__name__} has to know what stands around each norm; give example_inputs, "
                "or set the module's example_input_array: what one forward of the module takes"
            )
        if not batch_norms(pl_module):
            raise AnybatchError(
                "Convert: the module has no BatchNorm when the trainer sets it up; if it builds its layers in "
                "configure_model, call ab.convert_ at the end of that, and give Convert(None) here for what comes after"
            )
        self.report = convert_(pl_module, self.config, inputs, self.where)
        rank_zero_info(f"Convert: the norms of the module\n{self.report}")
        done.append((self.config, self.where))

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let the layers know when the optimizers step."""
        self._refuse_spoilt(trainer, pl_module)
        self._detach()
        self._attached = attach(pl_module, trainer.optimizers, trainer.scaler)

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Add the histories of all processes."""
        checkpoint[_KEY] = gather_histories("Convert", pl_module)

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Go on from the own process's history, where training goes on."""
        if trainer.state.fn != "fit":
            return
        if _KEY in checkpoint:
            take_history("Convert", pl_module, checkpoint[_KEY])
        else:
            rank_zero_warn("Convert: the checkpoint was saved without it and has no history; the past is gathered anew")

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Recalibrate, if asked to."""
        if self.recalibrate:
            with trainer.precision_plugin.forward_context():
                recalibrate_(pl_module, _training_batches(trainer), self.forward)

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Take the hooks off the optimizers."""
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def _refuse_spoilt(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        layers = {name: module for name, module in pl_module.named_modules() if isinstance(module, NormLayer)}
        converted = [row.name for row in self.report.converted] if self.report is not None else []
        if any(isinstance(pl_module.get_submodule(name), nn.SyncBatchNorm) for name in converted):
            raise AnybatchError(
                "Convert: sync_batchnorm=True has rebuilt the converted norms as SyncBatchNorm; leave it out, and give "
                "the method sync=True, e.g. ab.CBN(sync=True)"
            )
        if self.config is None and not layers:
            raise AnybatchError(
                "Convert(None): the module has no layer of anybatch; call ab.convert_ at the end of its "
                "configure_model, or give Convert a config"
            )
        held = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        for name, layer in layers.items():
            own = dict(layer.named_parameters(recurse=False))
            forgotten = [key for key, p in own.items() if key in layer.adds and p.requires_grad and id(p) not in held]
            if forgotten and any(id(p) in held for p in own.values()):
                raise AnybatchError(
                    f"Convert: the optimizer was made before the conversion and has not {forgotten[0]!r} of '{name}'; "
                    "make it in configure_optimizers, from self.parameters()"
                )


def _training_batches(trainer: "Trainer") -> Iterator[Any]:
    """The batches of an epoch, as the module gets them."""
    loader, module = trainer.train_dataloader, trainer.lightning_module
    if isinstance(loader, (list, tuple, dict)):
        raise AnybatchError(
            f"Convert: recalibrate=True is for one training loader, and there are {len(loader)}; call "
            "ab.recalibrate_(module, loader) yourself"
        )
    most = trainer.num_training_batches
    for batch in itertools.islice(loader or (), None if math.isinf(most) else int(most)):
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
