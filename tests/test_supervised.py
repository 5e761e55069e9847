"""The supervised loop against torch's own schedulers, float64 SGD, and problems whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eval.metrics import Accuracy
from eval.supervised import (
    Epoch,
    Group,
    Heads,
    feature_stream,
    final_scores,
    fit,
    make_head,
    scheduled_lr,
    threads_for,
    validate,
)
from pipeline.choices.order import epoch_order
from pipeline.errors import UserError


def two_clouds(count: int, seed: int):
    """Separable: two classes of 6-dimensional points around ±1."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    points = (2.0 * labels[:, None] - 1) + 0.4 * torch.randn(count, 6, generator=random)
    return points, labels


def train_clouds(heads: Heads, lr=0.1, epochs=3, seed=0, **settings):
    points, labels = two_clouds(256, 1)
    groups = [Group(list(heads.parameters()), lr)]
    stream = feature_stream(points, labels, seed, 32, epochs)
    held_out = [two_clouds(200, 2)]
    return fit(heads, groups, stream, validation=lambda: validate(heads, held_out), epochs=epochs, steps=8, **settings)


@pytest.mark.parametrize("milestones", [(), (3, 5)])
def test_schedule_is_torchs(milestones):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.3)
    if not milestones:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    else:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    group = Group([weight], 0.3, milestones=milestones)
    for epoch in range(7):
        assert scheduled_lr(group, epoch, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_updates_are_sgd_with_momentum_and_decay_per_group():
    """Four epochs of one step on a linear model, weights and bias in groups of their own, against float64 NumPy."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 5)), random.integers(3, size=12)
    heads = Heads({"a": make_head(5, 3, 0)}).double()
    linear = heads.heads["a"]
    w, b = linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()
    groups = [Group([linear.weight], 0.7, 0.01), Group([linear.bias], 0.2, 0.0, milestones=(2,))]
    stream = iter([(torch.from_numpy(x), torch.from_numpy(y))] * 4)
    history = fit(heads, groups, stream, validation=lambda: {"a": Accuracy(0.0, 0.0)}, epochs=4, steps=1)

    momentum_w, momentum_b = np.zeros_like(w), np.zeros_like(b)
    for epoch in range(4):
        logits = x @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        assert history[epoch].loss == pytest.approx(-np.log(p[np.arange(12), y]).mean(), rel=1e-6)
        error = (p - np.eye(3)[y]) / 12
        momentum_w = 0.9 * momentum_w + error.T @ x + 0.01 * w
        momentum_b = 0.9 * momentum_b + error.sum(0)
        w -= 0.7 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) * momentum_w
        b -= 0.2 * (0.1 if epoch >= 2 else 1) * momentum_b
    assert np.allclose(linear.weight.detach().numpy(), w, rtol=1e-10)
    assert np.allclose(linear.bias.detach().numpy(), b, rtol=1e-10)


def test_learns_a_separable_problem():
    history = train_clouds(Heads({"linear": make_head(6, 2, 0)}))
    assert history[-1].accuracy["linear"].top1 >= 99
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss


def test_heads_trained_at_once_are_those_trained_alone():
    together = Heads({"a": make_head(6, 2, 0), "b": make_head(6, 2, 1)})
    train_clouds(together)
    for name, seed in (("a", 0), ("b", 1)):
        alone = Heads({name: make_head(6, 2, seed)})
        train_clouds(alone)
        assert torch.equal(alone.heads[name].weight, together.heads[name].weight)


def test_same_seed_same_bits():
    weights = []
    for seed in (0, 0, 1):
        heads = Heads({"linear": make_head(6, 2, 0)})
        train_clouds(heads, seed=seed)
        weights.append(heads.heads["linear"].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_head_starts_as_published_whatever_the_global_generator():
    torch.manual_seed(5)
    first = make_head(2048, 100, 3)
    torch.manual_seed(6)
    assert torch.equal(make_head(2048, 100, 3).weight, first.weight)
    assert not torch.equal(make_head(2048, 100, 4).weight, first.weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(first.weight.mean().item()) < 4 * 0.01 / math.sqrt(204_800)
    assert not first.bias.any()


def test_feature_stream_is_the_loaders_order():
    features, labels = torch.arange(50.0)[:, None], torch.arange(50) % 3
    batches = list(feature_stream(features, labels, 4, 16, 2))
    assert len(batches) == 6
    for epoch in range(2):
        rows = torch.cat([x for x, _ in batches[3 * epoch : 3 * epoch + 3]])[:, 0].long()
        assert rows.tolist() == epoch_order(4, epoch, np.arange(50))[:48].tolist()
        assert torch.equal(torch.cat([y for _, y in batches[3 * epoch : 3 * epoch + 3]]), labels[rows])


def test_half_precision_features_train_in_full_precision():
    features, labels = torch.rand(8, 3).half(), torch.zeros(8, dtype=torch.int64)
    assert next(feature_stream(features, labels, 0, 4, 1))[0].dtype == torch.float32


def test_validation_does_not_touch_the_model():
    model = nn.Sequential(nn.BatchNorm1d(6), Heads({"linear": make_head(6, 2, 0)}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points, labels = two_clouds(64, 0)
    whole = validate(model, [(points, labels)])
    assert whole == validate(model, [(points[:50], labels[:50]), (points[50:], labels[50:])])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_validates_when_asked_and_at_the_end():
    history = train_clouds(Heads({"linear": make_head(6, 2, 0)}), epochs=5, validate_every=2)
    assert [bool(epoch.accuracy) for epoch in history] == [False, True, False, True, True]


def test_final_score_is_the_last_not_the_best():
    accuracy = [50.0, 70.0, None, 60.0]
    history = [Epoch(i + 1, 1.0, a and {"linear": Accuracy(a, 90.0)}, 0.0) for i, a in enumerate(accuracy)]
    scores = final_scores(history, "linear")
    assert (scores["top1"], scores["best_top1"], scores["best_epoch"]) == (60.0, 70.0, 2)


def test_a_loss_that_is_not_finite_stops():
    heads = Heads({"linear": make_head(6, 2, 0)})
    points, labels = two_clouds(8, 0)
    points[3, 2] = torch.inf
    with pytest.raises(UserError, match=r"loss is nan after epoch 1.*learning rates \(0\.5\)"):
        fit(heads, [Group(list(heads.parameters()), 0.5)], iter([(points, labels)]), validation=dict, epochs=2, steps=1)


def test_small_steps_use_one_thread_and_give_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(256 * 512 * 10):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads_for(256 * 2048 * 1000):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
