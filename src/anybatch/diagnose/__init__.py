"""The experiments of "Understanding Batch Normalization" on any model, and what a small batch needs besides."""

from .subject import Passes as Passes
from .subject import Subject as Subject
