"""References of the trainer's tests, written from the papers and recipes, not from the code they judge.

Plain NumPy or plain autograd in float64; no helper of train/ is used here, torchvision's ResNet excepted.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.spec import Batch


def barlow_loss(z1: np.ndarray, z2: np.ndarray, lambd: float, eps: float = 1e-5) -> float:
    """Zbontar 2021, eq. 1 and algorithm 1, element by element; z1, z2 (N, D) float64, not yet normalized."""
    n, d = z1.shape
    z1 = (z1 - z1.mean(0)) / np.sqrt(z1.var(0) + eps)
    z2 = (z2 - z2.mean(0)) / np.sqrt(z2.var(0) + eps)
    loss = 0.0
    for i in range(d):
        for j in range(d):
            c = float(z1[:, i] @ z2[:, j]) / n
            loss += (c - 1) ** 2 if i == j else lambd * c**2
    return loss


def barlow_loss_torch(z1: torch.Tensor, z2: torch.Tensor, lambd: float, eps: float = 1e-5) -> torch.Tensor:
    """The same in one breath, for autograd."""
    z1 = (z1 - z1.mean(0)) / (z1.var(0, correction=0) + eps).sqrt()
    z2 = (z2 - z2.mean(0)) / (z2.var(0, correction=0) + eps).sqrt()
    c = torch.einsum("ni,nj->ij", z1, z2) / len(z1)
    eye = torch.eye(len(c), dtype=c.dtype)
    return ((c - eye) ** 2 * (eye + lambd * (1 - eye))).sum()


def numeric_gradient(function, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences, entry by entry."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        gradient[index] = (function(up) - function(down)) / (2 * h)
    return gradient


def lars_step(p, g, m, lr, *, is_bias, weight_decay, momentum=0.9, eta=0.001, clip=False):
    """One LARS update of one parameter, RECIPE order: decay, trust ratio, momentum, learning rate. NumPy float64."""
    if not is_bias:
        g = g + weight_decay * p
        p_norm, g_norm = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        if p_norm > 0 and g_norm > 0:
            q = eta * p_norm / g_norm
            g = g * (min(q / lr, 1.0) if clip else q)
    m = momentum * m + g
    return p - lr * m, m


def learning_rate(step, steps_per_epoch, epochs, global_batch, lr, warmup_epochs=10):
    """The published schedule, in the published variables: warm-up, then base · q + base · 0.001 · (1 − q)."""
    base = global_batch / 256
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * step / warmup * lr
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (epochs * steps_per_epoch - warmup)))
    return (base * q + base * 0.001 * (1 - q)) * lr


class SyntheticLoader:
    """Batches as a pure function of (seed, step): the same global batch at any world size, as the real loaders'."""

    classes = ("a", "b")

    def __init__(self, images=32, global_batch=8, rank=0, world_size=1, size_px=16, seed=0, dtype=torch.float32):
        self.images, self.global_batch, self.size_px, self.seed = images, global_batch, size_px, seed
        self.rank, self.world_size, self.dtype = rank, world_size, dtype
        self.steps_per_epoch, self.ids = images // global_batch, np.arange(images)
        self.labels = np.zeros(images, np.int64)

    def global_views(self, step: int) -> list[torch.Tensor]:
        """Both views of the whole batch: a common picture and noise of their own, (G, 3, H, W)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shape = (self.global_batch, 3, self.size_px, self.size_px)
        common, *noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        return [(common + 0.3 * n).to(self.dtype) for n in noise]

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        share = self.global_batch // self.world_size
        for step in range(start_step, stop_step):
            rows = slice(self.rank * share, (self.rank + 1) * share)
            views = tuple(v[rows].contiguous(memory_format=torch.channels_last) for v in self.global_views(step))
            sample = torch.arange(share)
            yield Batch(views, torch.zeros(share, dtype=torch.int64), sample, step, step // self.steps_per_epoch)

    def close(self) -> None: ...


def reference_run(
    backbone: torch.nn.Module,
    projector_weights,
    loader,
    steps: int,
    *,
    lambd,
    lr_weights,
    lr_biases,
    epochs,
    warmup_epochs,
    weight_decay,
    eta,
    gradient_share_of_biases=1.0,
) -> dict[str, np.ndarray]:
    """The whole update in float64 on one process: views in, weights out, after `steps` steps.

    `backbone` is trained in place; `projector_weights` are the matrices of Linear-BN-ReLU-…-Linear, all its batch
    norms starting at weight 1 and bias 0. `gradient_share_of_biases` is 1 / W of the published code for 1-d parameters.
    """
    backbone = backbone.double().train()
    parameters = {f"backbone.{name}": p for name, p in backbone.named_parameters()}
    linear, norm = [], []
    for i, w in enumerate(projector_weights):
        linear.append(w.detach().double().clone().requires_grad_())
        parameters[f"projector.{3 * i}.weight"] = linear[-1]
        if i + 1 < len(projector_weights):
            norm.append([f(len(w), dtype=torch.float64).requires_grad_() for f in (torch.ones, torch.zeros)])
            parameters[f"projector.{3 * i + 1}.weight"], parameters[f"projector.{3 * i + 1}.bias"] = norm[-1]
    momentum = {name: np.zeros(p.shape) for name, p in parameters.items()}

    def embed(view):
        h = backbone(view.double())
        for w, (scale, shift) in zip(linear[:-1], norm, strict=True):
            h = h @ w.T
            h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * scale + shift
            h = h.clamp(min=0)
        return h @ linear[-1].T

    for step in range(steps):
        view_1, view_2 = loader.global_views(step)
        loss = barlow_loss_torch(embed(view_1), embed(view_2), lambd)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            is_bias = p.ndim == 1
            peak = lr_biases if is_bias else lr_weights
            lr = learning_rate(step, loader.steps_per_epoch, epochs, loader.global_batch, peak, warmup_epochs)
            g = g.numpy() * (gradient_share_of_biases if is_bias else 1.0)
            new, momentum[name] = lars_step(
                p.detach().numpy(), g, momentum[name], lr, is_bias=is_bias, weight_decay=weight_decay, eta=eta
            )
            with torch.no_grad():
                p.copy_(torch.from_numpy(new))
    return {name: p.detach().numpy() for name, p in parameters.items()}
