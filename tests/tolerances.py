"""Every tolerance of the suite, each derived.

u = unit round-off: 6e-8 for float32, 1.1e-16 for float64. A reduction over n values in pairwise or float64 accumulation
errs by a few u; a chain of some ten such steps by some tens of u; an ill-conditioned one (a gradient whose terms
cancel) by more, in units of the terms.
"""

import torch

# float64 against a float64 oracle: 1e4 u for chains with cancellation, well below any error of a formula.
ORACLE = {"rtol": 1e-9, "atol": 1e-11}
# float32, values of order one after some ten roundings: 16 u of the largest value.
SAME = {"rtol": 1e-6, "atol": 1e-6}
# float32, sums over a whole batch in another order: some 100 u.
REORDERED = {"rtol": 1e-5, "atol": 1e-5}
# Mean 1e4, variance 1: one unit in the last place of the input is 1e-3, and so is the output's error; a few of them.
LARGE_MEAN = {"rtol": 0.0, "atol": 6e-3}
# Inputs in half precision carry u = 5e-4 (float16), 4e-3 (bfloat16); outputs of order 4.
HALF = {torch.float16: {"rtol": 4e-3, "atol": 4e-3}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
