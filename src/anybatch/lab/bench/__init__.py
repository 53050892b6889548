"""What a method costs, relative to torch's BatchNorm: time, memory and bytes moved.

All methods are timed in one process, one step each a round in shuffled order, and a ratio is taken within its round:
what slows the machine slows both of its sides. No method is timed before its steps agree with float64's.
"""

from anybatch.lab.bench.config import BenchConfig, Row
from anybatch.lab.bench.records import Outcome, Timing, save
from anybatch.lab.bench.sweep import Sweep
from anybatch.lab.bench.timing import bench

__all__ = ["BenchConfig", "Outcome", "Row", "Sweep", "Timing", "bench", "save"]
