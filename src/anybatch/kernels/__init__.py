"""Fused paths for the passes over a batch, each beside its reference; ``use`` chooses among them by name."""

from .choose import use as use

__all__ = ["use"]
