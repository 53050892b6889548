"""The interface of detectron2's layers, which is not on the package index: what a norm meets there, and no more.

Written from how detectron2 behaves: `get_norm` takes a name or a callable of the channels; its Conv2d has the norm as
a child and calls the functional convolution, then the norm, then the activation; its frozen norm holds buffers.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Conv2d", "FrozenBatchNorm2d", "get_norm", "install"]


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.full((num_features,), 1 - eps))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class Conv2d(nn.Conv2d):
    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def get_norm(norm, out_channels):
    if norm in (None, ""):
        return None
    names = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": lambda channels: nn.GroupNorm(32, channels)}
    return (names[norm] if isinstance(norm, str) else norm)(out_channels)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `from detectron2.layers import ...` find the stand-in, for one test."""
    package, layers = ModuleType("detectron2"), ModuleType("detectron2.layers")
    layers.__dict__.update(Conv2d=Conv2d, FrozenBatchNorm2d=FrozenBatchNorm2d, get_norm=get_norm)
    package.layers = layers
    monkeypatch.setitem(sys.modules, "detectron2", package)
    monkeypatch.setitem(sys.modules, "detectron2.layers", layers)
