"""What "Understanding Batch Normalization" found, on a network of 33 layers and real images, at initialization.

Each is an inequality between the network with and without its norms; docs/diagnose.md has the numbers.
"""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from anybatch.diagnose import (
    Subject,
    cancellation,
    depth,
    diverging_step,
    gaussian_products,
    gradient_noise,
    learning_rate,
    logit_gradients,
    step_size,
    weight_gradients,
)
from anybatch.lab.data import load
from anybatch.lab.networks import deep_resnet

from .selection import usually

pytestmark = pytest.mark.real
WITH, WITHOUT = "with", "without"


@pytest.fixture(scope="module", params=usually([0], [0, 1]), ids="seed {}".format)
def subjects(request: pytest.FixtureRequest) -> Mapping[str, Subject]:
    torch.manual_seed(request.param)
    torch.set_num_threads(1)
    data = load("embedded", 128, 1)
    images, labels = data.normalise(data.train_images), data.train_labels
    network = deep_resnet(10)
    subject = Subject(network, list(zip(images.split(32), labels.split(32), strict=True)), F.cross_entropy, 4)
    bare = subject.without_norms()
    assert bare is not None
    return {WITH: subject, WITHOUT: bare}


def test_the_largest_stable_learning_rate(subjects: Mapping[str, Subject]) -> None:
    """With the norms it is at least 30 times as large."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    found = {name: learning_rate.measure(subject, rates, steps=8) for name, subject in subjects.items()}
    assert found[WITH].largest_stable >= 30 * max(found[WITHOUT].largest_stable, rates[0])


def test_the_loss_along_the_gradient(subjects: Mapping[str, Subject]) -> None:
    """The loss falls at steps ten times as large; where it is a thousandfold without norms, with them it is less."""
    found = {name: step_size.measure(subject) for name, subject in subjects.items()}
    assert found[WITH].largest_lowering > 10 * found[WITHOUT].largest_lowering
    diverging = found[WITHOUT].smallest_diverging
    assert diverging is not None
    assert found[WITH].ratio[found[WITH].steps == diverging] < 2


def test_a_diverging_step(subjects: Mapping[str, Subject]) -> None:
    """Along it the last layer's variance explodes without norms, the more the deeper, and stays with them."""
    found = diverging_step.measure_all(subjects)
    growth = [float(var[-1].mean() / var[0].mean()) for var in found[WITHOUT].var]
    assert growth == sorted(growth)
    assert growth[-1] > 1e4
    assert 0.1 < found[WITH].growth < 10


def test_moments_against_depth(subjects: Mapping[str, Subject]) -> None:
    """Variances grow by more than a hundred from the first to the last convolution without norms, with them by less
    than that; in logarithms the growth is about even: half of it is there half way."""
    found = {name: depth.measure(subject) for name, subject in subjects.items()}
    without = found[WITHOUT].var[:-1].log()
    assert without[-1] - without[0] > torch.tensor(100.0).log()
    middle = without[15:19].mean() - without[0]
    assert 0.25 < middle / (without[-1] - without[0]) < 0.75
    assert found[WITH].var[:-1].max() < 100 * found[WITH].var[:-1].min()
    assert found[WITHOUT].mean[-2] > 100 * found[WITHOUT].mean[0]


def test_gradients_of_the_middle_layer(subjects: Mapping[str, Subject]) -> None:
    """Heavy tails without norms, and larger gradients by far; nearly normal ones with them."""
    found = {name: weight_gradients.measure(subject) for name, subject in subjects.items()}
    assert found[WITHOUT].kurtosis > 10 > 6 > found[WITH].kurtosis
    assert found[WITHOUT].std > 10 * found[WITH].std


def test_gradients_at_the_output(subjects: Mapping[str, Subject]) -> None:
    """Without norms two fifths or more of the gradient at the output is the same for every image."""
    found = {name: logit_gradients.measure(subject) for name, subject in subjects.items()}
    assert found[WITHOUT].common > 0.4 > 0.2 > found[WITH].common


def test_cancellation(subjects: Mapping[str, Subject]) -> None:
    """The terms of a gradient cancel with norms, to a few per cent, and five times less without."""
    found = {name: cancellation.measure(subject) for name, subject in subjects.items()}
    ratios = {name: float(at.ratio.median()) for name, at in found.items()}
    assert ratios[WITHOUT] > 5 * ratios[WITH]
    assert ratios[WITH] < 0.1


def test_noise_of_the_gradient(subjects: Mapping[str, Subject]) -> None:
    """C is more than ten times as large without norms: with them a step three times as large has the smaller bound."""
    found = {name: gradient_noise.measure(subject, examples=8) for name, subject in subjects.items()}
    assert found[WITHOUT].noise > 10 * found[WITH].noise
    assert found[WITHOUT].bound(0.1, 8) > found[WITH].bound(0.3, 8)


def test_conditioning_against_depth() -> None:
    """The condition number of a product grows with every matrix, by more than a factor of ten each in the mean."""
    found = gaussian_products.measure()
    assert (found.condition.diff() > 0).all()
    factors = found.factors[-1] - found.factors[0]
    assert (found.condition[-1] / found.condition[0]) ** (1 / factors) > 10
