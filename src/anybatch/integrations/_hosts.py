"""A host library, imported when an adapter is used, or one error that says how to install it."""

import importlib
from types import ModuleType

from ..errors import AnybatchError, first_line

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """The imported host module.

    Args:
        module: its dotted name, such as ``timm.layers``.
        extra: of this package that installs the host.

    Raises:
        AnybatchError: the host is not installed, or was built for another torch. Where something that it needs is
            missing, its own ImportError is left as it is.
    """
    host = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != host:
            raise
        raise AnybatchError(
            f"{module} is not installed, which this part of anybatch is for: pip install 'anybatch[{extra}]'"
        ) from error
    except RuntimeError as error:  # torchvision's operators are built for one version and kind of torch
        raise AnybatchError(
            f"{host} is installed and does not fit this torch ({first_line(error)}): "
            f"install the two in versions that go together"
        ) from error
