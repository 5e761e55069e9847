"""The loss against eq. 1 in float64: value, gradient, metrics, invariances, memory and precision."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles_train import barlow_loss, barlow_loss_torch, numeric_gradient
from train.config import PretrainConfig
from train.flags import resolved
from train.methods.barlow_twins import ROWS, BarlowTwins, BarlowTwinsLoss


def method(width: int, **flags) -> BarlowTwins:
    """Barlow Twins on vectors: the backbone is the identity, the projector one matrix."""
    config = PretrainConfig(projector=str(width), lr_weights=0.2, **flags)
    return BarlowTwins(nn.Identity(), width, config)


def embeddings(images: int, width: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(images, width, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(images, width, generator=generator, dtype=torch.float64)
    return [(3 * z + 1).to(dtype).requires_grad_() for z in (z1, z2)]


def loss_of(module: BarlowTwins, z1, z2):
    return BarlowTwinsLoss.apply(module.normalize(z1), module.normalize(z2), module.config.lambd)


def test_value_and_gradient_against_eq_1_and_central_differences():
    z1, z2 = embeddings(7, 5)
    module = method(5, lambd=0.3)
    loss = loss_of(module, z1, z2)[0]
    loss.backward()
    a, b = z1.detach().numpy(), z2.detach().numpy()
    assert loss.item() == pytest.approx(barlow_loss(a, b, 0.3), rel=1e-12)
    np.testing.assert_allclose(z1.grad, numeric_gradient(lambda x: barlow_loss(x, b, 0.3), a), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(z2.grad, numeric_gradient(lambda x: barlow_loss(a, x, 0.3), b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("images", "width"), [(64, 200), (2, 3), (5, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_value_and_gradient_against_autograd(images, width, dtype, tolerance):
    z1, z2 = embeddings(images, width, dtype)
    module = method(width)
    loss = loss_of(module, z1, z2)[0]
    loss.backward()
    x1, x2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    expected = barlow_loss_torch(x1, x2, module.config.lambd)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in ((z1.grad, x1.grad), (z2.grad, x2.grad)):
        assert (ours - theirs).norm() <= tolerance * max(theirs.norm().item(), 1e-3)


def test_blocks_of_rows_join(monkeypatch):
    monkeypatch.setattr("train.methods.barlow_twins.ROWS", 7)
    assert ROWS > 20
    z1, z2 = embeddings(16, 20)
    expected = barlow_loss_torch(z1.detach(), z2.detach(), 0.0051)
    assert loss_of(method(20), z1, z2)[0].item() == pytest.approx(expected.item(), rel=1e-12)


def test_metrics():
    images, width = 32, 6
    z1, z2 = embeddings(images, width)
    module = method(width, loss_scale=0.1, lambd=0.02)
    module.projector[0].weight.data = torch.eye(width)
    module.double()
    loss, metrics = module((z1, z2))
    n1, n2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1.detach(), z2.detach()))
    c = n1.T @ n2 / images
    torch.testing.assert_close(module.pictures()["cross_correlation"], c)
    off = c[~torch.eye(width, dtype=torch.bool)]
    assert metrics["diagonal_mean"].item() == pytest.approx(c.diagonal().mean().item())
    assert metrics["off_diagonal_rms"].item() == pytest.approx(off.square().mean().sqrt().item())
    assert metrics["on_diagonal"].item() == pytest.approx((c.diagonal() - 1).square().sum().item())
    assert metrics["off_diagonal"].item() == pytest.approx(off.square().sum().item())
    expected = 0.1 * (metrics["on_diagonal"] + 0.02 * metrics["off_diagonal"])
    assert loss.item() == metrics["loss"].item() == pytest.approx(expected.item())
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_shift_and_scale_of_a_dimension_do_not_matter():
    z1, z2 = embeddings(64, 10)
    module = method(10)
    scale = torch.linspace(2, 20, 10, dtype=torch.float64)
    moved = loss_of(module, z1 * scale - 3, z2 * scale.flip(0) + 5)[0]
    assert moved.item() == pytest.approx(loss_of(module, z1, z2)[0].item(), rel=1e-4)


def test_equal_and_decorrelated_views_cost_almost_nothing():
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double()
    z = torch.cat([hadamard, -hadamard])
    assert loss_of(method(4), z, z)[0].item() < 1e-8


def test_loss_is_float32_whatever_autocast_does():
    torch.manual_seed(0)
    module = method(16)
    views = [z.detach() for z in embeddings(32, 16, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module(views)
        products = module.projector(views[0])
        loss.backward()
    assert products.dtype == torch.bfloat16
    assert module.corner[0].dtype == loss.dtype == torch.float32
    # bf16 has 8 bits: the loss of the same bf16 products, in float64, differs by far less than one of them
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = [module.projector(v).double() for v in views]
    assert loss.item() == pytest.approx(barlow_loss_torch(*rounded, 0.0051).item(), rel=1e-5)


def test_holds_one_square_matrix():
    """D = 1024: C is 4 MiB in float32. Peak above the start stays below two of them."""
    z1, z2 = (torch.randn(8, 1024, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        BarlowTwinsLoss.apply(z1, z2, 0.005)[0].backward()
    large = [e for e in profile.events() if e.self_cpu_memory_usage >= 1024 * 1024 * 4]
    assert len(large) == 1


@pytest.mark.slow
def test_sixteen_thousand_dimensions():
    """D = 16384, the largest of the paper: with few images ‖z1ᵀ z2‖² = ⟨z1 z1ᵀ, z2 z2ᵀ⟩ needs no D×D matrix."""
    images, width, lambd = 4, 16384, 0.0051
    z1, z2 = embeddings(images, width, torch.float32)
    loss = BarlowTwinsLoss.apply(z1, z2, lambd)[0]
    loss.backward()
    x1, x2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    diagonal = (x1 * x2).sum(0) / images
    all_squares = ((x1 @ x1.T) * (x2 @ x2.T)).sum() / images**2
    expected = (diagonal - 1).square().sum() + lambd * (all_squares - diagonal.square().sum())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in ((z1.grad, x1.grad), (z2.grad, x2.grad)):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_groups_split_by_dimension_and_the_paper_world_size_divides_the_bias_step():
    config = resolved(PretrainConfig(projector="8-4", lr_weights=0.2, global_batch=512, paper_world_size=16))
    module = BarlowTwins(nn.Conv2d(3, 6, 3), 6, config)
    weights, biases = module.parameter_groups()
    assert all(p.ndim > 1 for p in weights["params"]) and len(weights["params"]) == 3
    assert all(p.ndim == 1 for p in biases["params"]) and len(biases["params"]) == 3
    assert weights["peak_lr"] == pytest.approx(0.4)
    assert biases["peak_lr"] == pytest.approx(0.0048 * 2 / 16)
    assert biases["weight_decay"] == 0 and not biases["adapt"]
