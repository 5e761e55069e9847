"""MoCo v2: several updates against NumPy written from the papers, its recipe, and what is refused.

What it shares with the other methods (ranks, resuming, nothing read back, bf16) is tested with them.
"""

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.spec import ViewSpec
from tests.oracles_train import SyntheticLoader, numeric_gradient
from tests.test_methods import WIDTH, embeddings, method, unit
from train.cards import PRESETS
from train.distributed import Ranks
from train.flags import resolved
from train.lars import LARS
from train.methods.moco_v2 import contrast
from train.pretrain import train

IMAGES, STEPS = 8, 3
MOMENTUM, TEMPERATURE, LR, DECAY = 0.9, 0.2, 0.3, 0.01


def encode(weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """A linear backbone, then the head of Chen 2020b: linear, ReLU, linear, with biases; rows of length 1."""
    backbone, w1, b1, w2, b2 = weights
    return unit(np.maximum(x @ backbone.T @ w1.T + b1, 0) @ w2.T + b2)


def info_nce(queries: np.ndarray, keys: np.ndarray, queue: list[np.ndarray]) -> float:
    """He 2020, eq. 1, query by query: its own key against all that wait."""
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        own = math.exp(query @ key / TEMPERATURE)
        total -= math.log(own / (own + sum(math.exp(query @ other / TEMPERATURE) for other in queue)))
    return total / len(queries)


class Reference:
    """He 2020, algorithm 1, in the published order, with a queue that is a queue; SGD as torch documents it."""

    def __init__(self, weights: list[np.ndarray], queue: np.ndarray):
        self.query, self.key = [w.copy() for w in weights], [w.copy() for w in weights]
        self.speed = [np.zeros_like(w) for w in weights]
        self.queue = deque(queue, maxlen=len(queue))  # a full one lets its oldest go

    def follow(self) -> None:
        self.key = [MOMENTUM * k + (1 - MOMENTUM) * q for k, q in zip(self.key, self.query, strict=True)]

    def step(self, view_1: np.ndarray, view_2: np.ndarray) -> float:
        self.follow()
        keys, waiting = encode(self.key, view_2), list(self.queue)

        def loss(i: int, w: np.ndarray) -> float:
            return info_nce(encode([*self.query[:i], w, *self.query[i + 1 :]], view_1), keys, waiting)

        found = loss(0, self.query[0])
        gradients = [numeric_gradient(lambda w, i=i: loss(i, w), own) for i, own in enumerate(self.query)]
        self.queue.extend(keys)
        for i, gradient in enumerate(gradients):
            self.speed[i] = 0.9 * self.speed[i] + gradient + DECAY * self.query[i]
            self.query[i] = self.query[i] - LR * IMAGES / 256 * self.speed[i]
        return found


def arrays(module: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in module.parameters()]


def test_several_updates_against_the_papers_in_numpy():
    """Loss, weights of both encoders and the queue's content; the queue, 12, is no multiple of the batch, 8."""
    module = method("moco_v2", temperature=TEMPERATURE, ema=MOMENTUM, lr_weights=LR, weight_decay=DECAY)
    assert len(module.queue) == 12
    optimizer = LARS(module.parameter_groups())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["peak_lr"]
    begun = [*arrays(module.backbone), *arrays(module.projector)]
    reference = Reference(begun, module.queue.numpy().copy())
    for step in range(STEPS):
        views = embeddings(IMAGES, WIDTH, seed=step)
        loss, _ = module(tuple(torch.from_numpy(view) for view in views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.after_step(step, STEPS)
        assert loss.item() == pytest.approx(reference.step(*views), rel=1e-7), step
        queue = np.roll(module.queue.numpy(), -int(module.position), 0)
        np.testing.assert_allclose(queue, np.array(reference.queue), rtol=1e-6, atol=1e-8)
    reference.follow()  # published at the start of a step, here at the end of the one before
    ended = [*arrays(module.backbone), *arrays(module.projector)]
    for ours, theirs in zip(ended + arrays(module.key_encoder), reference.query + reference.key, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(begun, ended, strict=True))


def test_whose_own_key_is_nearest():
    keys = nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    queue = torch.cat([keys[:1], -keys])
    queries = torch.cat([keys[:3], -keys[3:]])
    assert contrast(queries, keys, queue[1:], 0.2)[1].item() == 0.75
    loss, _ = contrast(queries[:1], keys[:1], queue[:1], 0.2)  # a twin in the queue: even odds
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_queue_begins_with_random_keys_of_the_seed():
    first, again = method("moco_v2").queue, method("moco_v2").queue
    assert torch.equal(first, again) and torch.allclose(first.norm(dim=1), torch.ones(12, dtype=first.dtype))
    torch.manual_seed(1)
    assert not torch.equal(nn.functional.normalize(torch.randn(12, 5)).double(), first)


# ---- the recipe: facebookresearch/moco, main_moco.py with --mlp --moco-t 0.2 --aug-plus --cos ----


def test_the_published_recipe():
    card = resolved(PRESETS["imagenet-moco_v2"])
    assert (card.arch, card.projector, card.epochs, card.global_batch) == ("resnet50", "2048-128", 200, 256)
    assert (card.queue, card.ema, card.temperature, card.warmup_epochs) == (65536, 0.999, 0.2, 0)
    assert (card.lr_weights, card.weight_decay) == (0.03, 1e-4)
    view = ViewSpec(
        area=(0.2, 1.0), interpolation="bilinear", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        p_jitter=0.8, p_grey=0.2, p_blur=0.5, sigma_px=(0.1, 2.0), p_flip=0.5, p_solarize=0.0,
    )  # fmt: skip
    module = method("moco_v2")
    assert module.VIEWS["imagenet"] == (view, view)
    assert [type(layer) for layer in module.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(layer.bias is not None for layer in module.projector if isinstance(layer, nn.Linear))


def test_one_learning_rate_and_weight_decay_for_all_that_is_trained():
    module = method("moco_v2", weight_decay=1e-4, lr_weights=0.03, global_batch=12)
    (group,) = module.parameter_groups()
    trained = {name for name, p in module.named_parameters() if any(p is own for own in group["params"])}
    assert trained == {name for name, _ in module.named_parameters() if not name.startswith("key_encoder.")}
    assert (group["peak_lr"], group["weight_decay"], group["adapt"]) == (0.03 * 12 / 256, 1e-4, False)
    assert not any(p.requires_grad for p in module.key_encoder.parameters())


def test_solo_learns_cifar10_card():
    """scripts/pretrain/cifar/mocov2plus.yaml, and its augmentations, symmetric_weak.yaml."""
    card = PRESETS["cifar10-moco_v2"]
    assert (card.arch, card.projector, card.epochs, card.global_batch) == ("resnet18", "2048-256", 1000, 256)
    assert (card.queue, card.ema, card.temperature, card.warmup_epochs) == (32768, 0.99, 0.2, 10)
    assert (card.lr_weights, card.weight_decay) == (0.3, 1e-4)
    assert method("moco_v2").VIEWS["cifar10"] == (ViewSpec(saturation=0.4, p_blur=0.5),) * 2


# ---- what is refused ----


def test_a_queue_shorter_than_a_step_is_refused():
    with pytest.raises(UserError, match="--queue 255 holds fewer keys than a step of --global-batch 256 makes; give"):
        resolved(replace(PRESETS["cifar10-demo-moco_v2"], queue=255))
    with pytest.raises(UserError, match="--queue -1 is too small"):
        resolved(replace(PRESETS["cifar10-demo-moco_v2"], queue=-1))


def test_another_methods_queue_is_refused():
    with pytest.raises(UserError, match="--queue 64 does not go with --method byol, but with moco_v2"):
        resolved(replace(PRESETS["cifar10-demo-byol"], queue=64))


def test_a_queue_longer_than_the_dataset_is_refused_before_there_is_a_folder(tmp_path):
    config = replace(PRESETS["cifar10-demo-moco_v2"], queue=33, global_batch=8, run=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--queue 33 is longer than the dataset \(32 images\).*at most 32"):
        train(resolved(config), Ranks(0, 1, torch.device("cpu"), None), SyntheticLoader(32, 8))
    assert not (tmp_path / "run").exists()
