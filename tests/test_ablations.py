"""The ablations of Barlow Twins against their definitions in Zbontar 2021, section 4, written out in NumPy, float64."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.spec import BARLOW_TWINS_VIEWS, WITHOUT, views_without
from tests.oracles_train import numeric_gradient
from tests.test_methods import embeddings, method
from train.cards import PRESETS
from train.config import Augmentation
from train.flags import resolved
from train.methods.barlow_ablations import AblatedBarlowTwins, ablated_loss, is_ablated
from train.methods.barlow_twins import BarlowTwins
from train.methods.choose import make_method, view_table

ABLATIONS = {
    "invariance": {"loss": "invariance"},
    "redundancy": {"loss": "redundancy"},
    "cross-entropy": {"loss": "cross-entropy", "temperature": 0.5},
    "feature": {"embedding_norm": "feature"},
    "bare": {"projector_norm": "none", "embedding_norm": "none"},
    "predictor": {"predictor": "7-5"},
    "stopped": {"stop_gradient": True},
    "asymmetric": {"predictor": "7-5", "stop_gradient": True},
}


def batch_norm(z: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return (z - z.mean(0)) / np.sqrt(z.var(0) + eps)


def matrix(z1: np.ndarray, z2: np.ndarray, norm: str) -> np.ndarray:
    if norm == "none":
        return (z1 - z1.mean(0)).T @ (z2 - z2.mean(0)) / len(z1)
    z1, z2 = batch_norm(z1), batch_norm(z2)
    if norm == "feature":
        return (z1 / np.linalg.norm(z1, axis=1)[:, None]).T @ (z2 / np.linalg.norm(z2, axis=1)[:, None])
    return z1.T @ z2 / len(z1)


def loss_of(c: np.ndarray, loss: str, lambd: float, temperature: float) -> float:
    d = len(c)
    on = [c[i, i] for i in range(d)]
    off = [c[i, j] for i in range(d) for j in range(d) if i != j]
    if loss == "cross-entropy":
        repel = np.log(sum(np.exp(max(x, 0) / temperature) for x in off))
        return -np.log(sum(np.exp(x / temperature) for x in on)) + lambd * repel
    return (loss != "redundancy") * sum((x - 1) ** 2 for x in on) + (loss != "invariance") * lambd * sum(
        x**2 for x in off
    )


@pytest.mark.parametrize("name", ABLATIONS)
def test_value_against_its_definition(name):
    module = method("barlow_twins", lambd=0.3, loss_scale=0.1, **ABLATIONS[name])
    assert isinstance(module, AblatedBarlowTwins)
    views = tuple(torch.from_numpy(z) for z in embeddings(8))
    loss, metrics = module(views)
    with torch.no_grad():
        z1, z2 = (module.projector(module.backbone(view)) for view in views)
        z1 = module.predictor(z1) if module.config.predictor else z1
    c = matrix(z1.numpy(), z2.numpy(), module.config.embedding_norm)
    expected = 0.1 * loss_of(c, module.config.loss, 0.3, module.config.temperature)
    assert loss.item() == metrics["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert metrics["diagonal_mean"].item() == pytest.approx(c.diagonal().mean())
    off = c[~np.eye(len(c), dtype=bool)]
    assert metrics["off_diagonal_rms"].item() == pytest.approx(np.sqrt((off**2).mean()))


@pytest.mark.parametrize("loss", ["barlow-twins", "invariance", "redundancy", "cross-entropy"])
def test_gradient_against_central_differences(loss):
    config = replace(PRESETS["imagenet"], loss=loss, lambd=0.3, temperature=0.5)
    x = np.random.default_rng(0).normal(size=(4, 4))
    c = torch.from_numpy(x).requires_grad_()
    ablated_loss(c, config).backward()
    expected = numeric_gradient(lambda x: loss_of(x, loss, 0.3, 0.5), x)
    np.testing.assert_allclose(c.grad, expected, rtol=1e-6, atol=1e-8)


def test_with_nothing_taken_out_it_is_barlow_twins():
    config = resolved(replace(PRESETS["imagenet"], projector="8-5", lr_weights=0.1))
    assert not is_ablated(config) and type(make_method(nn.Identity(), 6, config)) is BarlowTwins
    gradients, losses = [], []
    for kind in (BarlowTwins, AblatedBarlowTwins):
        torch.manual_seed(0)
        module = kind(nn.Linear(6, 6), 6, config).double()
        loss, metrics = module(tuple(torch.from_numpy(z) for z in embeddings(8)))
        loss.backward()
        losses.append([metrics[name].item() for name in sorted(metrics)])
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_the_stopped_side_gets_no_gradient():
    """With the second view's side a constant, the gradient is that of the first alone."""
    module = method("barlow_twins", **ABLATIONS["stopped"])
    views = tuple(torch.from_numpy(z) for z in embeddings(8))
    module(views)[0].backward()
    other = method("barlow_twins")
    z1, z2 = (other.normalize(other.projector(other.backbone(view))) for view in views)
    z2 = z2.detach()
    c = z1.T @ z2 / len(z1)
    ablated_loss(c, other.config).backward()
    torch.testing.assert_close(module.backbone.weight.grad, other.backbone.weight.grad, rtol=1e-9, atol=1e-12)


def test_no_batch_norm_is_left_in_a_bare_projector():
    module = method("barlow_twins", **ABLATIONS["bare"])
    assert not any(isinstance(part, nn.BatchNorm1d) for part in module.projector)
    assert any(isinstance(part, nn.BatchNorm1d) for part in method("barlow_twins").projector)


def test_augmentations_left_out():
    card = replace(PRESETS["imagenet"], without=("grey", "solarize"))
    for view, before in zip(view_table(card), BARLOW_TWINS_VIEWS, strict=True):
        assert (view.p_grey, view.p_solarize) == (0, 0)
        assert replace(view, p_grey=before.p_grey, p_solarize=before.p_solarize) == before
    assert view_table(replace(card, without=())) == BARLOW_TWINS_VIEWS
    assert get_args(Augmentation) == tuple(WITHOUT)
    assert all(view.area == (1, 1) for view in views_without(BARLOW_TWINS_VIEWS, ["crop"]))
