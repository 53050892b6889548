"""What has to be there before torch.compile traces on: a graph can neither make it nor change it later.

torch runs a function at compile time, on the objects themselves, where a traced one hands it to ``comptime``; see
:meth:`anybatch.layers.history.HistoryLayer.history_of`.
"""

from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

__all__ = ["make_histories"]


def make_histories(context: Any) -> None:
    """Make every history of the layer that is ``self`` in the frame being traced."""
    layer = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    with unset_fake_temporarily():
        layer.make_histories()
    for history in layer.histories.values():
        for tensor in history.tensors():
            # What mark_static does outside of a trace: no size of it changes, even where an image's is the same.
            tensor._dynamo_static_indices = set(range(tensor.dim()))
