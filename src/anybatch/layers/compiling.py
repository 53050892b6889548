"""What torch.compile has to be told of a layer with a history, by the layer itself.

A graph can neither make state nor hold on to it: torch runs a function at compile time, on the objects themselves,
where a traced one hands it to ``comptime`` (:meth:`anybatch.layers.history.HistoryLayer.history_of`). And a checkpoint
inside of a graph computes again, in the backward, from what the forward has changed by then.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["computed_once", "make_histories"]


def _wanted(said: logging.LogRecord) -> bool:
    return "context_fn is passed" not in said.getMessage()


# torch warns of what is changed in place between the two runs of a selective checkpoint; here nothing is.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(_wanted)


def make_histories(context: Any) -> None:
    """Make every history of the layer that is ``self`` in the frame being traced."""
    layer = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    with unset_fake_temporarily():
        layer.make_histories()
    for history in layer.histories.values():
        for tensor in history.tensors():
            # What mark_static does outside of a trace: no size of it changes, even where an image's is the same.
            tensor._dynamo_static_indices = set(range(tensor.dim()))


def computed_once(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, traced so that the graph of a checkpoint around it keeps what it gives."""
    contexts = partial(create_selective_checkpoint_contexts, _save)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _save(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE
