"""``python -m tests.soak --examples 200 --minutes 30 --seed 0``: exit code 1 where a configuration fails."""

import argparse
import sys

# What a replayed line names.
from .comparison import check
from .configurations import COMPILERS, Configuration
from .runner import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="how many configurations")
    parser.add_argument("--minutes", type=float, default=30, help="none is begun after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compilers", nargs="*", default=COMPILERS, help="to draw from, each as often as named")
    parser.add_argument("--replay", help="one configuration, as a run has printed it")
    given = parser.parse_args()
    if given.replay:
        print(check(eval(given.replay, {"Configuration": Configuration})))
        return 0
    soak = Soak(given.examples, given.minutes, given.seed, given.compilers, lambda line: print(line, flush=True))
    soak.run()
    print(soak.report())
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
