"""What findings say of results made by hand: every rule, every branch; and of networks of which the truth is known."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import (
    EXPERIMENTS,
    batch_noise,
    cancellation,
    depth,
    evaluation_gap,
    learning_rate,
    logit_gradients,
    step_size,
    weight_gradients,
)
from anybatch.diagnose.findings import Situation, judge

from .diagnose_nets import chain, deep

GIVEN, WITHOUT = "as given", "without norms"
MARK = {"trouble": "!", "well": "+", "note": "-"}
nan = math.nan


def said(name: str, at: Any, bare: Any = None, **around: Any) -> list[tuple[str, str]]:
    results = {name: {GIVEN: at} if bare is None else {GIVEN: at, WITHOUT: bare}}
    found = judge(results, Situation(**{"batch": 8, "trained": True, "plain": True, **around}))
    assert all(finding.experiment == name for finding in found)
    return [(MARK[finding.level], finding.text) for finding in found]


def gap(apart: float, training: float, evaluation: float, recalibrated: float | None = None) -> Any:
    losses = {"training": training, "evaluation": evaluation}
    losses |= {} if recalibrated is None else {"recalibrated": recalibrated}
    of = torch.tensor([apart / 2, 3 * apart / 2])
    return evaluation_gap.EvaluationGap(("a", "b"), of, of, of, of, losses, losses)


def noise(*levels: float, sizes: Sequence[int] = (1, 8)) -> Any:
    errors = torch.tensor([levels])
    return batch_noise.BatchNoise(("a",), torch.ones(1), torch.ones(1), tuple(sizes), errors, 0 * errors, 64)


def moments(*variances: float) -> Any:
    return depth.Depth(tuple("abc"), torch.tensor(variances), torch.tensor(variances, dtype=torch.float64))


def steps(*ratio: float) -> Any:
    return step_size.StepSizes(10.0 ** torch.arange(len(ratio)), torch.tensor(ratio), 1.0)


def rates(*losses: float) -> Any:
    loss = torch.tensor(losses)
    return learning_rate.LearningRates(10.0 ** torch.arange(-2, len(losses) - 2), loss[:, None], loss, loss, loss)


def at_output(matrix: Tensor) -> Any:
    common = float(len(matrix) * matrix.mean(0).square().sum() / matrix.square().sum())
    return logit_gradients.LogitGradients(matrix, common)


def tails(kurtosis: float) -> Any:
    return weight_gradients.WeightGradients("conv", torch.ones(3), torch.ones(2), 1.0, kurtosis, 1.0)


def ratios(*b: float) -> Any:
    return cancellation.Cancellation(tuple("abc"), torch.ones(len(b)), torch.tensor(b))


@pytest.mark.parametrize(
    ("at", "mark", "words"),
    [
        (gap(0.1, 1, 1.4), "+", "evaluation does what training does: outputs of the norms differ by 10 %"),
        (gap(0.54, 1, 1), "+", "differ by 54 %"),
        (gap(0.1, 1, 1.2), "+", "evaluation does what training does"),
        (gap(0.9, 1, 1.2, 1), "-", "though the loss does not show it (loss 1.2 in evaluation, 1 in training)"),
        (gap(0.9, 1, 1.6, 1), "!", "ab.recalibrate_(model, loader) brings it to 1"),
        (gap(0.1, 1, 1.6, 1.2), "!", "evaluation is off (loss 1.6 in evaluation, 1 in training)"),
        (gap(0.1, 1, nan, 1.2), "!", "because the running statistics are behind"),
        (
            gap(0.9, 1, 5, 1.3),
            "!",
            "5 in evaluation, 1 in training, 1.3 after recalibration; outputs of the norms differ",
        ),
        (gap(0.9, 1, 5, 1.3), "!", "Train with another method: anybatch advise"),
        (gap(0.1, 1, nan, nan), "!", "evaluation fails"),
        (gap(0.0, 1, 1), "+", "differ by 0 %"),
        (gap(0.0, -2, -2, -2), "+", "evaluation does what training does"),
        (gap(0.0, 0, 0, 0), "+", "evaluation does what training does"),
        (gap(0.9, -2, 3, -2), "!", "because the running statistics are behind"),
    ],
)
def test_evaluation(at: Any, mark: str, words: str) -> None:
    """Fine, behind, or beyond what recalibration mends; a network that has not been trained is none of these."""
    ((found, text),) = said("evaluation-gap", at)
    assert found == mark
    assert words in text
    ((found, text),) = said("evaluation-gap", at, trained=False)
    assert found == "-"
    assert text.startswith("the running statistics have not seen a batch")


@pytest.mark.parametrize(
    ("name", "at", "bare", "wanted"),
    [
        ("batch-noise", noise(0.9, 0.21), None, [("!", "statistics of 8 examples are off by 21 % of a standard")]),
        ("batch-noise", noise(0.9, 0.19), None, [("+", "statistics of 8 examples are off by 19 %")]),
        ("batch-noise", noise(0.9, sizes=[1]), None, []),
        ("step-size", steps(1.0, 1.1), None, [("!", "no step along the gradient lowers the loss")]),
        ("step-size", steps(1.0, 1.1), steps(0.5, 1.1), [("!", "no step along the gradient lowers the loss")]),
        ("step-size", steps(0.9, 0.9, 2), steps(0.5, 1.1), [("-", "may be 10 times as large as without the norms")]),
        ("step-size", steps(0.9, 2), steps(0.5, 0.1, 1.1), [("-", "may be 0.1 times")]),
        ("step-size", steps(0.9, 2), steps(0.5, 1.1), []),  # about as large
        ("step-size", steps(0.9, 2), steps(1.0, 1.1), []),
        ("step-size", steps(0.9, 2), None, []),
        ("depth", moments(1, 5, 1.1e4), None, [("!", "differs by a factor of 1e+04")]),
        ("depth", moments(1, 1e-5, 1), None, [("!", "differs by a factor of 1e+05")]),
        ("depth", moments(1, 0, 1), None, [("!", "'b' puts out the same for every example and position")]),
        ("depth", moments(1, 9e3), moments(1, 1e9), []),
        ("learning-rate", rates(nan, nan), None, [("!", "training diverges at every learning rate from 0.01 on")]),
        ("learning-rate", rates(1, 1, nan), rates(1, nan, 1), [("-", "rates up to 0.1, without the norms up to 0.01")]),
        ("learning-rate", rates(1, nan), rates(nan, 1), [("-", "rates up to 0.01, without the norms at none that wa")]),
        ("learning-rate", rates(1, nan), None, []),
        ("logit-gradients", at_output(torch.eye(4)), None, []),
        ("logit-gradients", at_output(torch.ones(8, 3)), None, [("!", "100 % of the gradient at the output is the s")]),
        ("logit-gradients", at_output(torch.ones(7, 3)), None, []),  # few rows are soon alike
        ("weight-gradients", tails(10.4), None, [("-", "gradients of 'conv' are heavy-tailed: kurtosis 10")]),
        ("weight-gradients", tails(10), tails(50), []),
        ("weight-gradients", tails(nan), None, []),
        ("cancellation", ratios(0.1, 0.4, 0.9), None, [("-", "hardly cancel: sums are 40 % of their terms")]),
        ("cancellation", ratios(0.1, 0.29, 0.9), ratios(0.9), []),
        ("cancellation", ratios(nan), None, []),
        ("gradient-noise", object(), object(), []),
    ],
)  # fmt: skip
def test_rules(name: str, at: Any, bare: Any, wanted: list[tuple[str, str]]) -> None:
    found = said(name, at, bare)
    assert [mark for mark, _ in found] == [mark for mark, _ in wanted]
    assert all(words in text for (_, text), (_, words) in zip(found, wanted, strict=True))


def test_one_example_is_called_so() -> None:
    ((_, text),) = said("batch-noise", noise(0.9, 0.2), batch=1)
    assert "statistics of one example are off by 90 %" in text
    ((_, text),) = said("evaluation-gap", gap(2, 1, 5, 5), batch=1)
    assert "stands for the statistics of one example that" in text


def test_norms_that_do_not_go_by_the_batch_alone() -> None:
    """What a batch's statistics are worth is no trouble of theirs."""
    ((mark, text),) = said("batch-noise", noise(0.9, 0.9), plain=False)
    assert (mark, "if one goes by the batch alone" in text) == ("-", True)


def test_troubles_come_first() -> None:
    """Then what is well, then notes, each in the order of the experiments; only what was given is judged."""
    results = {
        "step-size": {GIVEN: steps(0.9, 0.9, 2), WITHOUT: steps(0.5, 2)},
        "batch-noise": {GIVEN: noise(0.1, 0.1)},
        "cancellation": {GIVEN: ratios(0.9)},
        "evaluation-gap": {GIVEN: gap(0.1, 1, 1)},
        "logit-gradients": {GIVEN: at_output(torch.ones(8, 3))},
        "depth": {WITHOUT: moments(1, 1e9)},
    }
    found = judge(results, Situation(8, True, True))
    assert [(finding.level, finding.experiment) for finding in found] == [
        ("trouble", "logit-gradients"),
        ("well", "batch-noise"),
        ("well", "evaluation-gap"),
        ("note", "step-size"),
        ("note", "cancellation"),
    ]
    assert {finding.experiment for finding in found} <= set(EXPERIMENTS)


def stream(count: int, examples: int, bright: float) -> list[tuple[Tensor, Tensor]]:
    """Images of two classes, told apart by stripes; each as bright as it happens to be."""
    taken = []
    for _ in range(count):
        t = torch.randint(2, (examples,))
        stripes = torch.stack([torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)] * 3)
        x = torch.where(t.view(-1, 1, 1, 1) > 0, stripes, stripes.transpose(1, 2)) + torch.randn(examples, 3, 8, 8) / 2
        taken.append((x + bright * torch.randn(examples, 1, 1, 1), t))
    return taken


def trained(examples: int, bright: float = 0.0, momentum: float = 0.1, steps: int = 40) -> nn.Module:
    body = [
        part
        for _ in range(4)
        for part in (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU())
    ]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, t in stream(steps, examples, bright):
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    return model


def verdict(model: nn.Module, taken: list[tuple[Tensor, Tensor]]) -> tuple[str, str]:
    found = ab.diagnose(model, taken, F.cross_entropy, batches=len(taken), experiments=["evaluation-gap"])
    (finding,) = found.findings
    return MARK[finding.level], finding.text


def test_verdicts_on_networks() -> None:
    """Fine after training; behind after a change of scale that training does not see; failing at one bright image a
    batch; untrained."""
    fine = trained(16)
    mark, text = verdict(fine, stream(4, 16, 0))
    assert (mark, "evaluation does what training does" in text) == ("+", True)
    with torch.no_grad():
        for parameter in (p for module in fine if isinstance(module, nn.Conv2d) for p in module.parameters()):
            parameter *= 3
    mark, text = verdict(fine, stream(4, 16, 0))
    assert (mark, "ab.recalibrate_" in text) == ("!", True)
    collapsed = trained(1, bright=3.0, steps=250)
    mark, text = verdict(collapsed, stream(16, 1, 3.0))
    assert (mark, "Train with another method" in text) == ("!", True)
    mark, text = verdict(chain(), stream(4, 16, 0))
    assert (mark, "have not seen a batch" in text) == ("-", True)


def test_recalibration_is_not_said_to_mend_what_it_does_not_change() -> None:
    ((mark, text),) = said("evaluation-gap", gap(0.9, 1, 1, 1))
    assert mark == "-"
    assert "recalibrate_" not in text


def test_running_statistics_that_came_without_a_count() -> None:
    """Of weights from before torch 1.0, or by recalibration: num_batches_tracked is 0, evaluation is the model's."""
    model = trained(16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    assert verdict(model, stream(4, 16, 0))[0] == "+"
    recalibrated = chain()
    ab.recalibrate_(recalibrated, stream(4, 16, 0))
    assert verdict(recalibrated, stream(4, 16, 0))[0] == "+"


def test_norms_without_running_statistics() -> None:
    """Evaluation is training, whatever the number of batches."""
    model = chain(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    assert verdict(model, stream(4, 16, 0))[0] == "+"


@pytest.mark.parametrize("make", [chain, deep])
def test_batches_of_one_example(make: Any) -> None:
    """The variance of a Linear's output over one example, and how that differs between examples, say nothing."""
    taken = [(torch.randn(1, 3, 5, 7), torch.randint(5, (1,))) for _ in range(8)]
    found = ab.diagnose(make(), taken, F.cross_entropy, experiments=["depth", "logit-gradients"])
    assert found.findings == ()
