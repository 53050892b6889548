"""How a norm layer gets to know the linear map that feeds it, without any change to the model's code.

A hook on the map ties its input and effective weight to its output tensor; the norm reads them off the tensor it is
given. So a map shared by several norms, a norm shared by several maps, one called on several levels in one step, and
any control flow are all the same case, nothing outlives the tensor, and copies and pickles of a model work by
themselves.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..core.linear_map import MAPS, LinearMap
from ..core.pooled import Map
from ..core.tensors import version
from ..errors import AnybatchError
from .base import NormLayer
from .surroundings import Surroundings

__all__ = ["FedLayer", "Feed", "Link", "map_of"]


_TAG = "_anybatch_feed"


class Feed(NamedTuple):
    """One run of a map, as the norm after it needs it."""

    map: nn.Module
    geometry: LinearMap
    x: Tensor  # the map's input, detached
    weight: Tensor  # the weight that made the output, attached
    bias: Tensor | None
    version: int  # of the output tensor when it was made

    def detached(self) -> "Feed":
        """The same of a map that ran without gradients, and gets none through its norm."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def map_of(feed: Feed | None, channels: int, like: Tensor) -> Map:
    """The map of a run in the dtype of statistics, attached; None: one of no columns."""
    if feed is None:
        return Map(like.new_zeros(channels, 0), None)
    bias = None if feed.bias is None else feed.bias.to(like.dtype)
    return Map(feed.geometry.plain_rows(feed.weight).to(like.dtype), bias)


class Link(NamedTuple):
    """A map that a norm follows."""

    map: nn.Module
    rows: tuple[int, int]  # (C, K), read once: computing a parametrized weight may change it
    handles: tuple[Any, ...]


class FedLayer(NormLayer):
    """A norm layer that follows linear maps."""

    exclusive: bool = True  # nothing but this norm uses what the maps put out: they may be folded

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._links: list[Link] = []
        self._stash: Feed | None = None

    @property
    def maps(self) -> tuple[nn.Module, ...]:
        """The maps this norm follows; they stay where they are in the model and are no children of the norm."""
        return tuple(link.map for link in self._links)

    def follows(self, map: nn.Module, inside: bool = False, exclusive: bool = True) -> Self:
        """Tell the norm which map feeds it.

        Args:
            map: Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear whose output this norm normalises.
            inside: the norm is called inside the map's own forward, on what the map computed (detectron2's Conv2d).
            exclusive: no one but this norm uses the map's output, so that the two can be folded.

        Returns:
            The norm itself.

        Raises:
            AnybatchError: ``map`` is no linear map, or its output channels are not the norm's.
        """
        geometry = LinearMap.of(map)
        if any(link.map is map for link in self._links):
            return self
        if geometry is None:
            known = ", ".join(m.__name__ for m in MAPS)
            raise AnybatchError(f"follows({type(map).__name__}): no linear map; give one of {known}")
        if any(is_lazy(p) for p in map.parameters()):
            raise AnybatchError(f"follows({map}): its weight is not made yet; run one forward of it first")
        rows = geometry.rows_shape(map.weight)  # type: ignore[arg-type]
        channels = rows[0]
        if channels != self.num_features:
            raise AnybatchError(
                f"follows({map}): the map puts out {channels} channels, the norm has num_features={self.num_features}"
            )
        self.dims = self.dims or max(1, len(geometry.kernel))
        handles: list[Any] = []
        computed = parametrize.is_parametrized(map, "weight")
        if inside:
            handles.append(map.register_forward_pre_hook(self._stash_input, with_kwargs=True))
            handles.append(map.register_forward_hook(self._drop_stash, always_call=True))
        else:
            if computed:
                handles.append(map.register_forward_pre_hook(_keep_weight))
            handles.append(map.register_forward_hook(self._tag_output, with_kwargs=True))
            if computed:
                handles.append(map.register_forward_hook(_release_weight, always_call=True))
        self._links.append(Link(map, rows, tuple(handles)))
        self.exclusive = self.exclusive and exclusive
        return self

    def meet(self, around: Surroundings) -> None:
        """Follow the maps that the converter found."""
        for fed in around.feeds:
            self.follows(fed.map, inside=fed.inside, exclusive=around.exclusive)

    def unfollow(self) -> None:
        """Forget every map and take the hooks off them."""
        for link in self._links:
            for handle in link.handles:
                handle.remove()
        self._links, self._stash, self.exclusive = [], None, True

    def take_feed(self, y: Tensor) -> tuple[int, Feed | None]:
        """The run of a followed map that made ``y``, and the map's index; (-1, None) for a norm that follows none.

        Raises:
            AnybatchError: ``y`` is not what one of the maps put out.
        """
        if not self._links:
            return -1, None
        feed, now = self._stash, 0
        if feed is None:
            feed, now = _tag_of(y), version(y)
        for i, link in enumerate(self._links):
            if feed is not None and link.map is feed.map:
                if feed.version != now or y.dim() != feed.weight.dim():
                    break
                return i, self._reached(feed, y)
        followed = " or ".join(str(link.map) for link in self._links)
        raise AnybatchError(
            f"{type(self).__name__}({self.num_features}): its input of shape {tuple(y.shape)} is not the untouched "
            f"output of {followed}, which it follows. Convert the model again with "
            "example inputs that show how it runs now, or call unfollow() to pool without compensation"
        )

    def _reached(self, feed: Feed, y: Tensor) -> Feed:
        """The feed, its weights attached where a gradient of ``y`` reaches the map.

        Raises:
            AnybatchError: it does, and the weight was computed where autograd could not see it; or the weight is gone.
        """
        if not torch.compiler.is_compiling() and feed.weight.untyped_storage().size() == 0:
            raise AnybatchError(
                f"{type(self).__name__}: FSDP has freed the weight of its map before the norm could see it; put "
                f"both into one fully_shard unit, or fully_shard the map, {feed.map}, by itself"
            )
        if not y.requires_grad:
            return feed.detached()
        unseen = parametrize.is_parametrized(feed.map, "weight") and not feed.weight.requires_grad
        if unseen and any(p.requires_grad for p in feed.map.get_submodule("parametrizations").parameters()):
            raise AnybatchError(
                f"{type(self).__name__}: its map's parametrized weight was computed without gradients, in a reentrant "
                "checkpoint that ends between the two; put the norm inside, or use_reentrant=False"
            )
        return feed

    def _stash_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.training:
            self._stash = _feed(module, args, kwargs, 0)

    def _drop_stash(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stash = None

    def _tag_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.training:
            _tag(output, module, args, kwargs)


def _feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], version: int) -> Feed:
    x = args[0] if args else kwargs["input"]
    geometry = LinearMap.of(module)
    assert geometry is not None
    weight, bias = module.weight, module.bias
    if hasattr(module, "reshard"):  # FSDP2 shards the map by itself, and frees these as soon as it has run
        weight, bias = weight.clone(), bias if bias is None else bias.clone()  # type: ignore[operator]
    return Feed(module, geometry, x.detach(), weight, bias, version)  # type: ignore[arg-type]


def _tag(output: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    setattr(output, _TAG, _feed(module, args, kwargs, version(output)))


def _tag_of(y: Tensor) -> Feed | None:
    # Full-backward hooks on the map or the norm put a view of the whole tensor in its place.
    base = y._base
    if not hasattr(y, _TAG) and base is not None and (base.shape, base.stride()) == (y.shape, y.stride()):
        return getattr(base, _TAG, None)
    return getattr(y, _TAG, None)


def _keep_weight(module: nn.Module, args: Any) -> None:
    # A parametrized weight is computed anew at every access; the cache makes the hook see the one that made the output.
    context = parametrize.cached()
    context.__enter__()
    module.__dict__.setdefault("_anybatch_cached", []).append(context)


def _release_weight(module: nn.Module, args: Any, output: Any) -> None:
    stack = module.__dict__.get("_anybatch_cached")
    if stack:
        stack.pop().__exit__(None, None, None)
        if not stack:
            del module.__dict__["_anybatch_cached"]
