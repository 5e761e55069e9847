"""LARS against a float64 NumPy reference, and that it never reads a value back from the device."""

import numpy as np
import pytest
import torch

from tests.oracles_train import lars_step
from train.lars import LARS, norms

SHAPES = {"conv": (8, 3, 3, 3), "linear": (5, 7), "zero": (4, 4), "bias": (6,), "scale": (1,)}
DECAY = 1e-2


def groups(parameters: dict, lr: float) -> list[dict]:
    return [
        {"params": [p for p in parameters.values() if p.ndim > 1], "lr": lr, "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.ndim == 1], "lr": lr / 3, "adapt": False},
    ]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_ten_steps(dtype, tolerance, clip):
    rng = np.random.default_rng(0)
    reference = {n: np.zeros(s) if n == "zero" else rng.normal(size=s) for n, s in SHAPES.items()}
    ours = {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in reference.items()}
    momentum = {n: np.zeros(s) for n, s in SHAPES.items()}
    optimizer = LARS(groups(ours, 0.0), eta=0.5, clip=clip)
    for step in range(10):
        lr = 0.2 + 0.05 * step
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr / 3
        for name, p in ours.items():
            # 0.01 makes the clip bite; a zero gradient on the still zero parameter takes the q = 1 branch
            g = rng.normal(size=SHAPES[name]) * (0.01 if step % 2 else 1.0) * (0 if name == "zero" and step < 3 else 1)
            p.grad = torch.tensor(g, dtype=dtype)
            is_bias = p.ndim == 1
            reference[name], momentum[name] = lars_step(
                reference[name],
                g,
                momentum[name],
                lr / 3 if is_bias else lr,
                is_bias=is_bias,
                weight_decay=DECAY,
                eta=0.5,
                clip=clip,
            )
        optimizer.step()
    for name, p in ours.items():
        error = np.abs(p.detach().numpy() - reference[name]).max() / np.abs(reference[name]).max()
        assert error < tolerance, name


def test_norms_of_large_matrices():
    """4096 × 4096: summed in one go, 0.07 % too small."""
    torch.manual_seed(0)
    tensors = [torch.randn(4096, 4096), torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last), torch.ones(())]
    expected = torch.stack([t.double().square().sum().sqrt() for t in tensors])
    torch.testing.assert_close(norms(tensors).double(), expected, rtol=1e-6, atol=0)


def test_the_clip_bites_in_that_test():
    p, g = np.full((2, 2), 3.0), np.full((2, 2), 0.01)
    zero = np.zeros((2, 2))
    free, _ = lars_step(p, g, zero, 0.2, is_bias=False, weight_decay=0, eta=0.5)
    capped, _ = lars_step(p, g, zero, 0.2, is_bias=False, weight_decay=0, eta=0.5, clip=True)
    assert abs(free - capped).max() > 0.1


def test_parameters_without_a_gradient_stay():
    kept, moved = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    moved.grad = torch.ones(3, 3)
    optimizer = LARS([{"params": [kept, moved], "lr": 1.0}])
    optimizer.step()
    assert torch.equal(kept, torch.ones(3, 3))
    assert not torch.equal(moved, torch.ones(3, 3))


def test_a_step_reads_nothing_back():
    """On the meta device every read of a value (item, bool, nonzero) raises."""
    parameters = [
        torch.empty(4, 4, device="meta", requires_grad=True),
        torch.empty(4, device="meta", requires_grad=True),
    ]
    for p in parameters:
        p.grad = torch.empty_like(p)
    LARS(groups(dict(enumerate(parameters)), 0.1), clip=True).step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((parameters[0] > 0).any())


def test_state_survives_a_round_trip():
    p = torch.ones(3, 3, requires_grad=True)
    optimizer = LARS([{"params": [p], "lr": 0.1, "name": "weights"}])
    p.grad = torch.full((3, 3), 0.5)
    optimizer.step()
    other = LARS([{"params": [torch.ones(3, 3, requires_grad=True)], "lr": 0.1, "name": "weights"}])
    other.load_state_dict(optimizer.state_dict())
    momentum = next(iter(other.state.values()))["momentum"]
    assert torch.equal(momentum, optimizer.state[p]["momentum"])


def test_rates_in_tensors_make_the_same_steps():
    """The form that a recorded step repeats: p − lr · m with lr read from memory, rounded once more."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3, 3), (5,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    optimizers = []
    for _ in range(2):
        p = [torch.nn.Parameter(w.clone()) for w in start]
        groups = [{"params": p[:2], "weight_decay": 1e-2}, {"params": p[2:], "adapt": False}]
        optimizers.append((p, LARS(groups, eta=0.02, clip=True)))
    for lr in (0.0, 0.3, 0.7):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for i, (parameters, optimizer) in enumerate(optimizers):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 if group["adapt"] else 0.5)
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
            if i == 1:
                optimizer.send_rates()
            optimizer.step()
    for ours, plain, first in zip(optimizers[1][0], optimizers[0][0], start, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-7)
        assert (ours - first).abs().max() > 1e-3
    assert optimizers[1][1].state_dict()["param_groups"] == optimizers[0][1].state_dict()["param_groups"]
