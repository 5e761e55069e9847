"""SwAV: value and gradient against Sinkhorn-Knopp and the loss as the paper writes them, the update against the
published order of things, the prototypes in and after the epoch in which they stay."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import UserError
from tests.oracles_train import SyntheticLoader, numeric_gradient
from tests.test_methods import embeddings, method, unit
from train.cards import PRESETS
from train.checkpoint import read_checkpoint
from train.distributed import Ranks
from train.flags import resolved
from train.methods.swav import SwAV, codes
from train.pretrain import train
from train.update import Update, make_update

CPU = Ranks(0, 1, torch.device("cpu"), None)
STEPS = 4  # of an epoch
K, D = 7, 5


def sinkhorn(scores: np.ndarray, epsilon: float = 0.05, iterations: int = 3) -> np.ndarray:
    """Caron 2020, eq. 3 to 5, as its pseudocode goes: (B, K) → codes (B, K). Q is (K, B), of marginals 1/K and 1/B."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    prototypes, images = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] *= 1 / prototypes / q[k].sum()
        for b in range(images):
            q[:, b] *= 1 / images / q[:, b].sum()
    return (q / q.sum(0)).T


def swapped_loss(z: list[np.ndarray], prototypes: np.ndarray, q: list[np.ndarray], temperature: float) -> float:
    """Caron 2020, eq. 1 and 2, image by image, with given codes."""
    total, images = 0.0, len(z[0])
    for s, t in ((0, 1), (1, 0)):
        scores = unit(z[s]) @ prototypes.T / temperature
        for b in range(images):
            log_sum = math.log(sum(math.exp(score) for score in scores[b]))
            total -= sum(q[t][b, k] * (scores[b, k] - log_sum) for k in range(len(prototypes)))
    return total / images / 2


def test_codes_against_the_papers_sinkhorn():
    rng = np.random.default_rng(0)
    scores = [rng.uniform(-1, 1, size=(9, K)) for _ in range(2)]
    scores[1][:, 2] = 1  # a prototype that all images are nearest to
    found = codes(torch.from_numpy(np.stack(scores)))
    for q, s in zip(found.numpy(), scores, strict=True):
        np.testing.assert_allclose(q, sinkhorn(s), rtol=1e-12)
    assert not found.requires_grad and found.sum(2).numpy() == pytest.approx(1)
    extreme = codes(torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]]))  # float32, the largest cosines
    assert extreme.isfinite().all() and extreme[0, 2].tolist() == pytest.approx([0.5, 0.5])


def test_value_and_gradient_against_the_papers_loss():
    a, b = embeddings(8, D)
    module = method("swav", prototypes=K, temperature=0.2)
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in (a, b))
    loss, metrics = module.loss(z1, z2)
    loss.backward()
    prototypes = module.prototypes.weight.detach().numpy()
    q = [sinkhorn(unit(z) @ prototypes.T) for z in (a, b)]
    assert loss.item() == pytest.approx(swapped_loss([a, b], prototypes, q, 0.2), rel=1e-12)
    wanted = [
        numeric_gradient(lambda x: swapped_loss([x, b], prototypes, q, 0.2), a),
        numeric_gradient(lambda x: swapped_loss([a, x], prototypes, q, 0.2), b),
        numeric_gradient(lambda x: swapped_loss([a, b], x, q, 0.2), prototypes),
    ]
    for gradient, expected in zip((z1.grad, z2.grad, module.prototypes.weight.grad), wanted, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    nearest = [(unit(z) @ prototypes.T).argmax(1) for z in (a, b)]
    hits = [(nearest[s] == q[t].argmax(1)).mean() for s, t in ((0, 1), (1, 0))]
    assert metrics["prototype_top1"].item() == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_lightly_has_the_same_loss():
    """An implementation of its own, in float32."""
    from lightly.loss import SwaVLoss

    z1, z2 = (torch.from_numpy(z).float() for z in embeddings(32, D))
    module = method("swav", prototypes=K).float()
    scores = [module.prototypes(nn.functional.normalize(z)) for z in (z1, z2)]
    assert module.loss(z1, z2)[0].item() == pytest.approx(SwaVLoss()(scores, []).item(), rel=1e-6)


def test_both_views_are_one_batch_to_the_batch_norms():
    module, seen = method("swav", prototypes=K), []
    module.projector[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    module(tuple(torch.from_numpy(z) for z in embeddings(8)))
    assert seen == [(16, 8)]


def test_autocast_leaves_prototypes_and_codes_in_float32():
    module, seen = method("swav", prototypes=K).float(), []
    module.prototypes.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module(tuple(torch.from_numpy(z).float() for z in embeddings(8)))
    assert seen == [torch.float32] * 2 and loss.dtype == torch.float32


# ---- the update ----


def tiny(**flags):
    """Resolved: the demo's card, made small; four steps an epoch."""
    config = replace(PRESETS["cifar10-demo-swav"], arch="test_resnet", projector="24-16", prototypes=12)
    config = replace(config, resolution=16, global_batch=8, epochs=3, log_every=1, run="x")
    return resolved(replace(config, **flags))


def views_of(step: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, 8, 3, 16, 16, generator=generator).contiguous().unbind())


def group_of(update: Update, name: str) -> dict:
    return next(group for group in update.optimizer.param_groups if group["name"] == name)


def larc(p: torch.Tensor, gradient: torch.Tensor, lr: float, decay: float, eta: float) -> torch.Tensor:
    """The first step of apex's LARC around SGD: no momentum yet."""
    p, gradient = p.double(), gradient.double()
    q = eta * p.norm() / (gradient.norm() + decay * p.norm())
    return p - lr * q * (gradient + decay * p)


@pytest.mark.parametrize("views", ["imagenet", "cifar10"])
def test_prototypes_stay_for_an_epoch_and_then_begin_without_momentum(views):
    """Step by step against the published order: normalize, gradient, none for frozen prototypes, LARC."""
    update = make_update(
        tiny(views=views, weight_decay=1e-6, warmup_epochs=1, lr_weights=4.0, lr_biases=4.0), CPU, steps_per_epoch=STEPS
    )
    weight = update.method.prototypes.weight
    before = weight.detach().clone()
    assert before.norm(dim=1).numpy() == pytest.approx(1)
    for step in range(STEPS):
        update(views_of(step), step)
        assert torch.equal(weight, before) and update.rates["prototypes"] == 0
        assert not update.optimizer.state[weight]["momentum"].any()
    assert update.rates["weights"] > 0 and update.optimizer.state[update.method.projector[0].weight]["momentum"].any()

    loss, _ = update.method(views_of(STEPS))
    (gradient,) = torch.autograd.grad(loss, [weight])
    update(views_of(STEPS), STEPS)
    expected = larc(before, gradient, group_of(update, "prototypes")["lr"], 1e-6, update.config.lars_eta)
    expected /= expected.norm(dim=1, keepdim=True)
    assert (expected - before).norm() > 1e-3
    np.testing.assert_allclose(weight.detach() - before, expected - before, atol=2e-3 * (expected - before).abs().max())
    for step in range(STEPS + 1, 2 * STEPS):
        update(views_of(step), step)
        assert weight.norm(dim=1).detach().numpy() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("views", "adapted"), [("imagenet", True), ("cifar10", False)])
def test_which_parameters_lars_adapts(views, adapted):
    """All in the published code, whose LARC asks for no names; solo-learn's leaves out 1-d parameters."""
    module = method("swav", prototypes=K, views=views, weight_decay=1e-6)
    groups = {group["name"]: group for group in module.parameter_groups()}
    assert [p is module.prototypes.weight for p in groups["prototypes"]["params"]] == [True]
    assert all(p.ndim == 1 for p in groups["biases"]["params"])
    assert (groups["biases"]["adapt"], groups["biases"]["weight_decay"]) == (adapted, 1e-6 if adapted else 0)
    assert all(groups[name]["adapt"] and groups[name]["weight_decay"] == 1e-6 for name in ("weights", "prototypes"))
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(module.parameters()))


def test_it_begins_with_its_residual_branches_on():
    update = make_update(tiny(arch="resnet10_narrow"), CPU)
    norms = [m for m in update.method.backbone.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) > 8 and all((m.weight == 1).all() for m in norms)
    start = make_update(replace(tiny(arch="resnet10_narrow"), method="simclr"), CPU)
    assert any((m.weight == 0).all() for m in start.method.backbone.modules() if isinstance(m, _BatchNorm))


def test_weights_of_init_from_are_kept():
    norm = nn.BatchNorm1d(6)
    nn.init.constant_(norm.weight, 0.3)
    SwAV(nn.Sequential(nn.Linear(6, 6), norm), 6, replace(tiny(), init_from=Path("run")))
    assert (norm.weight == 0.3).all()


class Killed(Exception):
    """Stands for the end of the process."""


class Breaking(SyntheticLoader):
    """Ends the run before the second epoch's second step."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == STEPS + 1:
                raise Killed
            yield batch


def test_resumed_across_the_end_of_the_first_epoch(tmp_path, monkeypatch):
    """The checkpoint is of the first epoch's last but one step: the same bits, momentum included; the export."""
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)

    def run(name: str, kind) -> dict:
        config = tiny(run=str(tmp_path / name), views="imagenet", epochs=2, checkpoint_every_steps=3)
        train(config, CPU, kind(images=8 * STEPS, global_batch=8))
        return read_checkpoint(tmp_path / name / "checkpoint.pt")

    straight = run("straight", SyntheticLoader)
    with pytest.raises(Killed):
        run("stopped", Breaking)
    assert read_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 3
    resumed = run("stopped", SyntheticLoader)
    assert resumed["step"] == straight["step"] == 2 * STEPS
    for key, value in straight["model"].items():
        assert torch.equal(resumed["model"][key], value), key
    for index, state in straight["optimizer"]["state"].items():
        assert torch.equal(resumed["optimizer"]["state"][index]["momentum"], state["momentum"]), index
    backbone = {name.removeprefix("backbone.") for name in straight["model"] if name.startswith("backbone.")}
    assert backbone and set(load_file(tmp_path / "straight" / "backbone.safetensors")) == backbone


# ---- cards and flags ----


def test_cards_have_the_published_values():
    """scripts/swav_400ep_2x224_pretrain.sh of facebookresearch/swav; solo-learn's scripts/pretrain/cifar/swav.yaml."""
    card = PRESETS["imagenet-swav"]
    assert (card.projector, card.prototypes, card.temperature, card.warmup_epochs) == ("2048-128", 3000, 0.1, 10)
    assert (card.lr_weights * 4096 / 256, card.weight_decay, card.lars_eta) == (pytest.approx(4.8), 1e-6, 0.001)
    assert not card.lars_clip and card.arch == "resnet50" and card.paper_world_size == 1
    card = PRESETS["cifar10-swav"]
    assert (card.projector, card.prototypes, card.temperature, card.warmup_epochs) == ("2048-128", 3000, 0.1, 10)
    assert (card.lr_weights, card.global_batch, card.weight_decay) == (0.6, 256, 1e-6)
    assert (card.lars_eta, card.lars_clip, card.epochs, card.arch) == (0.02, True, 1000, "resnet18")


@pytest.mark.parametrize(("views", "interpolation"), [("imagenet", "bilinear"), ("cifar10", "bicubic")])
def test_views_are_the_published_ones(views, interpolation):
    """src/multicropdataset.py with --min_scale_crops 0.08; solo-learn's symmetric.yaml. Two views of one kind."""
    first, second = SwAV.VIEWS[views]
    assert first == second and (first.area, first.interpolation, first.p_flip) == ((0.08, 1.0), interpolation, 0.5)
    assert (first.brightness, first.contrast, first.saturation, first.hue, first.p_jitter) == (0.8, 0.8, 0.8, 0.2, 0.8)
    assert (first.p_grey, first.p_blur, first.sigma_px, first.p_solarize) == (0.2, 0.5, (0.1, 2.0), 0.0)


def test_what_is_refused():
    with pytest.raises(UserError, match="--prototypes 64 does not go with --method simclr, but with swav"):
        resolved(replace(PRESETS["cifar10-simclr"], prototypes=64))
    with pytest.raises(UserError, match="--prototypes 1 is too small"):
        tiny(prototypes=1)
