"""The learning rate's share of its peak, against the published formula."""

import pytest

from tests.oracles_train import learning_rate
from train.update import lr_share


@pytest.mark.parametrize(("per_epoch", "epochs", "warmup"), [(7, 30, 10), (1251, 300, 10), (5, 4, 0), (3, 5, 10)])
def test_equal_to_the_published_formula_at_every_step(per_epoch, epochs, warmup):
    steps = range(0, per_epoch * epochs, 1 if epochs < 100 else 97)
    for step in steps:
        ours = lr_share(step, warmup * per_epoch, epochs * per_epoch) * 1024 / 256 * 0.2
        assert ours == pytest.approx(learning_rate(step, per_epoch, epochs, 1024, 0.2, warmup), rel=1e-12, abs=1e-15)


def test_its_landmarks():
    assert lr_share(0, 10, 100) == 0
    assert lr_share(5, 10, 100) == 0.5
    assert lr_share(10, 10, 100) == 1
    assert lr_share(55, 10, 100) == pytest.approx((1 + 0.001) / 2)
    assert lr_share(99, 10, 100) == pytest.approx(0.001, abs=4e-4)
