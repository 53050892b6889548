"""The table of methods: a config says what, a layer does it, one walker converts.

Adding a method is one file in layers/, with the layer and its config, one row here and one page in docs/methods/; the
contract tests, the converter, the command line and the lab enumerate this table. (Its public names, in __init__.py and
nn.py, are a decision of their own.)
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from .errors import AnybatchError, did_you_mean
from .layers.accumulated import AccumulatedBN
from .layers.batch_group import BatchGroupNorm
from .layers.bgn import BGN
from .layers.cbn import CBN
from .layers.config import NormConfig
from .layers.ghost import GhostBN
from .layers.iebn import IEBN
from .layers.nonorm import NoNorm
from .layers.proxy import ProxyNorm
from .layers.renorm import BatchRenorm
from .layers.torch_own import BN, GN
from .layers.weighed import ExampleWeighedBN
from .typed import split_method

__all__ = ["METHODS", "Method", "parse_method"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: as typed on the command line.
        make: config from options.
        label: as called in tables and plots.
        summary: one line.
        source: paper.
        page: in docs/methods/, without its ending; by default the name.
        trial: as typed for networks of few channels, where the defaults do not fit those; by default the name.
        cost: about what a training forward takes in BatchNorm's time, at one example on a CPU; to plan runs by.
    """

    name: str
    make: Callable[..., NormConfig]
    label: str
    summary: str
    source: str
    page: str = ""
    trial: str = ""
    cost: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "page", self.page or self.name)
        object.__setattr__(self, "trial", self.trial or self.name)

    @property
    def config(self) -> NormConfig:
        """The method with its default options."""
        return self.make()

    @property
    def small(self) -> NormConfig:
        """The method as tried on networks of few channels."""
        return parse_method(self.trial)

    @property
    def needs_map(self) -> bool:
        """Whether its layers have to know the map that feeds them."""
        return self.config.needs_map

    @property
    def per_example(self) -> bool:
        """Whether training statistics see one example at a time."""
        return self.config.in_groups(1) == self.config

    @property
    def foldable(self) -> bool:
        """Whether inference is one scale and shift a channel, so that it folds into the convolution before it."""
        layer = self.small.build(nn.BatchNorm2d(32))
        return bool(getattr(layer, "foldable", isinstance(layer, nn.BatchNorm2d)))


_ROWS = (
    Method(
        "bn",
        BN,
        "BatchNorm",
        "torch's BatchNorm: moments of the current batch",
        "Ioffe & Szegedy 2015",
        page="torch",
    ),
    Method(
        "gn",
        GN,
        "GroupNorm",
        "torch's GroupNorm: moments of channel groups of one example",
        "Wu & He 2018",
        page="torch",
        trial="gn(groups=4)",
    ),
    Method(
        "cbn",
        CBN,
        "CBN",
        "moments pooled over recent iterations, carried to today's weights",
        "Yao et al. 2021, and ours",
        cost=6.5,
    ),
    Method(
        "cbn-naive",
        partial(CBN, compensate=False),
        "CBN, no compensation",
        "moments pooled over recent iterations as they were; the history is a constant",
        "Yao et al. 2021",
        page="cbn",
        cost=5.0,
    ),
    Method(
        "cbn-paper",
        CBN.paper,
        "CBN as released",
        "CBN with every switch as its authors have it",
        "Yao et al. 2021",
        page="cbn",
        cost=11.0,
    ),
    Method(
        "accumulated",
        AccumulatedBN,
        "Accumulated BN",
        "moments of all micro-batches so far since the optimizer's step",
        "Bochkovskiy et al. 2020 (CmBN), and ours",
        cost=5.0,
    ),
    Method(
        "renorm",
        BatchRenorm,
        "Batch Renorm",
        "moments of the current batch, corrected within bounds towards the running ones",
        "Ioffe 2017",
        cost=4.0,
    ),
    Method(
        "bgn",
        BGN,
        "BGN",
        "moments of channel groups of the batch, the fewer the smaller it is",
        "Zhou et al. 2020, and ours",
        cost=7.0,
    ),
    Method(
        "ghost",
        GhostBN,
        "Ghost BN",
        "moments of every few examples of the batch",
        "Hoffer et al. 2017; Summers & Dinneen 2020",
        trial="ghost(examples_per_group=2)",
        cost=5.0,
    ),
    Method(
        "batch-group",
        BatchGroupNorm,
        "Batch+group norm",
        "moments of channel groups of a few examples",
        "Summers & Dinneen 2020",
        trial="batch-group(channel_groups=4)",
        cost=8.0,
    ),
    Method(
        "iebn",
        IEBN,
        "IEBN",
        "BatchNorm with a gate on gamma for each example and channel",
        "Liang et al. 2020",
        cost=5.0,
    ),
    Method(
        "iebn-cbn",
        partial(IEBN, window=8),
        "IEBN over CBN",
        "CBN with a gate on gamma for each example and channel",
        "Liang et al. 2020; Yao et al. 2021; and ours",
        page="iebn",
        cost=12.0,
    ),
    Method(
        "proxynorm",
        ProxyNorm,
        "Proxy Norm (layer)",
        "layer norm of one example, then the activation normalised by the moments of a proxy",
        "Labatie et al. 2021",
        cost=5.0,
    ),
    Method(
        "proxynorm-group",
        partial(ProxyNorm, base="group"),
        "Proxy Norm (group)",
        "group norm of one example, then the activation normalised by the moments of a proxy",
        "Labatie et al. 2021",
        page="proxynorm",
        trial="proxynorm-group(groups=4)",
        cost=2.5,
    ),
    Method(
        "weighed",
        ExampleWeighedBN,
        "BatchNorm, examples weighed",
        "BatchNorm; at inference an example's own moments are mixed into the running ones",
        "Summers & Dinneen 2020",
        cost=5.0,
    ),
    Method(
        "nonorm",
        NoNorm,
        "No normalization",
        "the norm's scale and shift alone, to see what its moments do",
        "Bjorck et al. 2018",
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def parse_method(text: str) -> NormConfig:
    """A config from what one types: ``cbn`` or ``cbn(window=16, pooling='equal')``.

    Raises:
        AnybatchError: an unknown method (the closest names are given), an unknown option or a value out of range.
    """
    name, given = split_method(text)
    if name not in METHODS:
        known = {known: row.name for row in METHODS.values() for known in (row.name, row.label.lower())}
        close = difflib.get_close_matches(name, known, cutoff=0.4)
        meant = dict.fromkeys(known[match] for match in close) or METHODS
        typed = text.partition("(")[0].strip()
        raise AnybatchError(
            f"unknown method {typed!r}; did you mean {' or '.join(meant)}? (`anybatch methods` lists all)"
        )
    options = list(inspect.signature(METHODS[name].make).parameters)
    for option in given:
        if option not in options:
            mend = did_you_mean(option, options, "correct or remove it;")
            raise AnybatchError(
                f"method {text!r}: it has no option '{option}'; {mend} the options of {name} are: "
                f"{', '.join(options) or 'none'}"
            )
    try:
        return METHODS[name].make(**given)
    except AnybatchError as error:
        raise AnybatchError(f"method {text!r}: {error}") from error
