"""A small sample of ``make soak``, and that the soak can fail."""

import pytest
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

import anybatch.layers.cbn
from anybatch.core.moments import Moments, bessel, moments
from anybatch.kernels.choose import passes_for
from anybatch.layers.replay import Replay

from .soak.comparison import ROUNDOFF, Outcome, check, compare
from .soak.configurations import Configuration, refusal
from .soak.runner import Soak
from .soak.training import trained

BATCHES = (((3,), (1,)), ((2,),), ((2,), (1,), (4,)))
every_precision = pytest.mark.parametrize("precision", ROUNDOFF)


def test_random_configurations() -> None:
    """Eager ones, for a compilation takes as long as all of them."""
    soak = Soak(examples=12, minutes=5, seed=4, compilers=["none"])
    soak.run()
    assert not soak.failures, soak.report()
    assert soak.drawn == 12


def test_compiled_with_a_checkpoint_in_it() -> None:
    """A window of two steps that accumulate: the second run is to see the history as the first has seen it."""
    batches = (((4,), (4,)), ((4,),))
    check(Configuration("cbn(window=3)", "linear", "float32", batches, (0, 0), "block", "aot_eager"))


@pytest.mark.parametrize("method", ["accumulated", "weighed", "cbn", "iebn", "renorm"])
def test_one_value_of_all_ranks(method: str) -> None:
    """A channel's only value, on one rank of two, and a batch on both before the step: as in one process."""
    check(Configuration(f"{method}(sync=True)", "linear", "float64", (((1, 0), (3, 3)),), (0,)))


def besselled(x: Tensor) -> Moments:
    now = moments(x)
    return now._replace(var=bessel(now.var, now.size))


@every_precision
def test_a_wrong_variance_is_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by one less than the count: with 12 to 48 values a channel it is a few percent off."""
    configuration = Configuration("cbn", "strided", precision, BATCHES, (0, 1, 0))
    compare([trained(0, 1, configuration)], configuration)
    with monkeypatch.context() as patched:
        patched.setattr(anybatch.layers.cbn, "passes_for", lambda y: passes_for(y)._replace(moments=besselled))
        results = [trained(0, 1, configuration)]
    with pytest.raises(AssertionError, match="is off by"):
        compare(results, configuration)


@every_precision
@pytest.mark.parametrize("method", ["weighed", "renorm(ramp_from=1, ramp_to=3)", "cbn"])
def test_a_batch_that_counts_twice_is_found(method: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second run of a checkpoint is taken for a forward of its own."""
    configuration = Configuration(method, "residual", precision, BATCHES, (0, 1, 0), "block")
    compare([trained(0, 1, configuration)], configuration)
    monkeypatch.setattr(Replay, "is_second_run", staticmethod(lambda: False))
    found = r"is off by|instead of|different number of tensors"  # the last by torch: a batch that is not looked at
    with pytest.raises((AssertionError, CheckpointError), match=found):
        compare([trained(0, 1, configuration)], configuration)


def test_a_refusal_has_to_come() -> None:
    """Documented ones are counted; others, and those that do not come, are failures."""
    refused = Configuration("cbn", "strided", "float32", BATCHES, (0, 1, 0), "reentrant norm")
    assert check(refused) == Outcome({}, {}, refusal(refused))
    with pytest.raises(Exception, match="unknown method"):
        check(Configuration("nothing", "strided", "float32", BATCHES, (0, 1, 0)))


def fails_on_three(configuration: Configuration) -> Outcome:
    most = max(map(len, configuration.batches))
    assert most < 3, f"{most} micro-batches"
    return Outcome({"output": 0.5}, {"output": 1e-6})


def test_a_run_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the smallest configuration that fails, which its line makes again; the others go on."""
    monkeypatch.setattr("tests.soak.runner.check", fails_on_three)
    said: list[str] = []
    soak = Soak(examples=5, minutes=1, seed=0, compilers=["none"], say=said.append)
    soak.run()
    assert soak.drawn == 5
    assert len(said) == len(soak.done) == 5 + soak.shrunk
    assert soak.failures
    for configuration, error in soak.failures:
        assert str(error).startswith("3 micro-batches")
        assert sorted(map(len, configuration.batches)) == [1, 1, 3]
        line = next(line for line in said if line.endswith(str(configuration)))
        assert eval(line[line.index("Configuration(") :]) == configuration
    report = soak.report()
    assert report.startswith("5 configurations of 5")
    assert report.count("FAILED Configuration(") == len(soak.failures)


def test_a_run_ends_in_time() -> None:
    soak = Soak(examples=20, minutes=0, seed=0)
    soak.run()
    assert soak.report().startswith("0 configurations of 20")
