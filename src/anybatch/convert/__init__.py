"""From torch's BatchNorm to a method of this library and back: pairing, the walker, the report."""

from .report import Report, Row
from .walker import convert_, revert_

__all__ = ["Report", "Row", "convert_", "revert_"]
