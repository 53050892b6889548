"""What the options of CBN may be (layers/cbn.py says what they do)."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from ..errors import AnybatchError
from .options import check_choice, check_flag, check_groups, check_whole

__all__ = ["check_cbn"]


def check_cbn(hints: Mapping[str, Any], **options: Any) -> None:
    """Refuse options out of range.

    Args:
        hints: types by name; of a Literal the choices are taken.
        options: by name.

    Raises:
        AnybatchError: naming the option, its value and what it may be.
    """
    for name, hint in hints.items():
        if get_origin(hint) is Literal:
            check_choice("CBN", name, options[name], get_args(hint))
    check_flag("CBN", "compensate", options["compensate"])
    for name, least in {"refresh": 1, "burn_in_steps": 0, "window_examples": 1}.items():
        check_whole("CBN", name, options[name], least)
    for name, least in {"window": 1, "average_reductions": 0}.items():
        check_whole("CBN", name, options[name], least, none=True)
    for name in ("positions", "momentum_batch"):
        check_whole("CBN", name, options[name], none=True)
    kind, window = options["kind"], options["window"] or options["window_examples"]
    if options["storage"] != "full" and (kind == "ring" or window > 256):
        # A batch's share must be more than half a unit in the last place, or what is kept stands still.
        raise AnybatchError(
            f"CBN: storage='bfloat16' is for 'exponential', window to 256: {kind=}, {window=} take 'full'"
        )
    check_groups("CBN", options["examples_per_group"], options.get("sync", False))
