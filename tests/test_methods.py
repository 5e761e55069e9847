"""SimCLR, BYOL, SimSiam, VICReg: value and gradient against float64 references written from the papers, and what
each promises beyond its loss."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from tests.oracles_train import numeric_gradient
from train.cards import PRESETS
from train.config import METHOD_NAMES, Preset, PretrainConfig
from train.flags import chosen_preset, resolved
from train.methods.byol import momentum_at
from train.methods.choose import METHODS, make_method
from train.methods.contract import collapse_metrics
from train.methods.simclr import nt_xent
from train.methods.simsiam import SimSiam
from train.methods.vicreg import VICReg, variance_and_covariance

WIDTH = 6


def embeddings(images: int, width: int = WIDTH, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    z1 = rng.normal(size=(images, width))
    return [z1, z1 + 0.5 * rng.normal(size=(images, width))]


def unit(z: np.ndarray) -> np.ndarray:
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def method(name: str, **flags) -> nn.Module:
    """A method on vectors: the backbone is one matrix, heads are small; float64."""
    torch.manual_seed(0)
    heads = {"byol": ("8-5", "7-5"), "simsiam": ("8-8-5", "4-5")}.get(name, ("8-5", ""))
    config = replace(PRESETS["imagenet"], preset="imagenet", method=name, global_batch=8, projector=heads[0])
    flags = {"predictor": heads[1], "stop_gradient": name == "simsiam", "lr_weights": 0.1} | flags
    flags = {"queue": 12 if name == "moco_v2" else 0} | flags
    return make_method(nn.Linear(WIDTH, WIDTH, bias=False), WIDTH, resolved(replace(config, **flags))).double()


# ---- references ----


def nt_xent_loss(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Chen 2020, eq. 1 and algorithm 1, pair by pair."""
    z = unit(np.concatenate([z1, z2]))
    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = [math.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / sum(others))
    return total / (2 * n)


def vicreg_terms(z: np.ndarray) -> tuple[float, float]:
    """Bardes 2022, eq. 1 to 4, of one view; the published code halves the variance term."""
    d = z.shape[1]
    covariance = np.cov(z.T)
    variance = sum(max(0.0, 1 - math.sqrt(z[:, j].var(ddof=1) + 1e-4)) for j in range(d)) / d / 2
    return variance, sum(covariance[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((unit(a) * unit(b)).sum(1).mean())


# ---- values and gradients ----


def test_nt_xent_against_its_definition_and_central_differences():
    a, b = embeddings(5)
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in (a, b))
    loss, found = nt_xent(*(nn.functional.normalize(z) for z in (z1, z2)), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(nt_xent_loss(a, b, 0.3), rel=1e-12)
    np.testing.assert_allclose(z1.grad, numeric_gradient(lambda x: nt_xent_loss(x, b, 0.3), a), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(z2.grad, numeric_gradient(lambda x: nt_xent_loss(a, x, 0.3), b), rtol=1e-6, atol=1e-8)
    z = unit(np.concatenate([a, b]))
    likeness = z @ z.T - 9 * np.eye(10)
    assert found.item() == pytest.approx((likeness.argmax(1) == (np.arange(10) + 5) % 10).mean())


def test_vicreg_against_its_definition_and_central_differences():
    a, _ = embeddings(7)
    z = torch.from_numpy(0.5 * a).requires_grad_()
    variance, covariance = variance_and_covariance(z)
    (variance + covariance).backward()
    assert (variance.item(), covariance.item()) == pytest.approx(vicreg_terms(0.5 * a), rel=1e-10)
    expected = numeric_gradient(lambda x: sum(vicreg_terms(x)), 0.5 * a)
    np.testing.assert_allclose(z.grad, expected, rtol=1e-6, atol=1e-8)


def test_vicregs_terms_are_weighed_as_published():
    module = method("vicreg")
    views = [torch.from_numpy(z) for z in embeddings(8)]
    loss, metrics = module(tuple(views))
    z = [module.projector(module.backbone(view)).detach().numpy() for view in views]
    terms = np.sum([vicreg_terms(one) for one in z], 0)
    assert loss.item() == pytest.approx(25 * ((z[0] - z[1]) ** 2).mean() + 25 * terms[0] + terms[1], rel=1e-9)
    assert metrics["variance"].item() == pytest.approx(terms[0])


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_predicting_methods_against_their_definition(name):
    module = method(name)
    views = tuple(torch.from_numpy(z) for z in embeddings(8))
    loss, _ = module(views)
    z = [module.projector(module.backbone(view)) for view in views]
    p = [module.predictor(one).detach().numpy() for one in z]
    if name == "byol":
        with torch.no_grad():  # gives the target other weights, so that it cannot be mistaken for the online network
            for parameter in module.target.parameters():
                parameter.mul_(1.3).add_(0.1)
        loss, _ = module(views)
        t = [module.target(view).numpy() for view in views]
        assert loss.item() == pytest.approx(4 - 2 * cosine(p[0], t[1]) - 2 * cosine(p[1], t[0]), rel=1e-9)
    else:
        z = [one.detach().numpy() for one in z]
        assert loss.item() == pytest.approx(-(cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2, rel=1e-9)


# ---- what each promises ----


def test_simsiams_gradient_stops_on_the_other_side():
    """The gradient is that of a loss whose targets are constants; without the stop it is another."""
    views = tuple(torch.from_numpy(z) for z in embeddings(8))
    gradients = {}
    for stopped in (True, False):
        module = method("simsiam", stop_gradient=stopped)
        module(views)[0].backward()
        gradients[stopped] = module.backbone.weight.grad
    module = method("simsiam")
    z = [module.projector(module.backbone(view)) for view in views]
    constants = [one.detach().clone() for one in z]
    p = [module.predictor(one) for one in z]
    cosines = [nn.functional.cosine_similarity(p[i], constants[1 - i]).mean() for i in range(2)]
    (-sum(cosines) / 2).backward()
    assert torch.allclose(gradients[True], module.backbone.weight.grad, rtol=1e-9)
    assert not torch.allclose(gradients[False], gradients[True], rtol=1e-2)


def test_simsiams_predictor_keeps_its_learning_rate():
    groups = {group["name"]: group for group in method("simsiam").parameter_groups()}
    assert groups["predictor"]["constant_lr"] and not groups["weights"].get("constant_lr")
    assert not any(group["adapt"] for group in groups.values())
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(method("simsiam").parameters()))


def after_training(stop_gradient: bool) -> dict[str, float]:
    """SimSiam's metrics after 600 steps on vectors whose views share a part and have a part of their own."""
    torch.manual_seed(0)
    config = replace(PRESETS["cifar10-demo-simsiam"], projector="16-16", predictor="4-16", stop_gradient=stop_gradient)
    module = SimSiam(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), 32, resolved(config))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for step in range(600):
        generator = torch.Generator().manual_seed(step)
        common = torch.randn(64, 32, generator=generator)
        loss, metrics = module(tuple(common + torch.randn(64, 32, generator=generator) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.item() for name, value in metrics.items()}


def test_simsiam_without_the_stop_is_seen_to_collapse():
    healthy, collapsed = after_training(stop_gradient=True), after_training(stop_gradient=False)
    assert healthy["embedding_spread"] > 0.95 and healthy["effective_dimensions"] > 3
    assert collapsed["embedding_spread"] < 0.6 and collapsed["effective_dimensions"] < 2.2
    assert collapsed["loss"] < healthy["loss"] - 0.3  # it looks like success


def test_collapse_metrics():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 64, generator=generator)
    metrics = collapse_metrics(z)
    assert metrics["embedding_spread"].item() == pytest.approx(1, abs=0.02)
    eigenvalues = np.linalg.eigvalsh(np.cov(unit(z.double().numpy()).T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert metrics["effective_dimensions"].item() == pytest.approx(expected, rel=1e-4) and expected > 55
    assert collapse_metrics(torch.ones(50, 64))["embedding_spread"].item() == pytest.approx(0, abs=1e-6)
    on_a_line = collapse_metrics(z[:, :1] * z[0])
    assert on_a_line["effective_dimensions"].item() == pytest.approx(1, abs=1e-3)


def test_byols_target_follows_by_its_schedule():
    module = method("byol", ema=0.9)
    targets, grouped = list(module.target.parameters()), {id(p) for g in module.parameter_groups() for p in g["params"]}
    assert not any(p.requires_grad or id(p) in grouped for p in targets)
    online = [*module.backbone.parameters(), *module.projector.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    before = [p.clone() for p in targets]
    module.after_step(3, 10)
    tau = 1 - 0.1 * (math.cos(math.pi * 0.3) + 1) / 2
    for new, old, followed in zip(targets, before, online, strict=True):
        assert torch.allclose(new, tau * old + (1 - tau) * followed, rtol=1e-12)
    assert momentum_at(0, 10, 0.9) == pytest.approx(0.9) and momentum_at(10, 10, 0.9) == pytest.approx(1)


def test_byols_target_is_part_of_a_checkpoint():
    assert any(name.startswith("target.") for name in method("byol").state_dict())


def test_bf16_autocast_keeps_the_loss_in_float32():
    views = tuple(torch.from_numpy(z).float() for z in embeddings(8))
    for name in METHOD_NAMES:
        module = method(name).float()
        exact, _ = module(views)
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = module(views)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.15, abs=0.1)
        assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values()) and "loss" in metrics


# ---- cards ----


def test_a_card_is_found_by_its_name_or_by_the_method():
    assert chosen_preset(["--preset", "cifar10-byol"]) == chosen_preset(["--preset", "cifar10", "--method=byol"])
    assert chosen_preset(["--method", "vicreg"]).preset == "imagenet-vicreg"
    assert chosen_preset([]).method == "barlow_twins"
    assert set(PRESETS) == set(get_args(Preset)) and set(METHODS) == set(METHOD_NAMES)
    assert len(PRESETS) == 3 * len(METHOD_NAMES)
    assert all(name.endswith(preset.method) or preset.method == "barlow_twins" for name, preset in PRESETS.items())
    assert all(resolved(preset).preset == name for name, preset in PRESETS.items())


HIDDEN = "512→2048 norm relu 2048→2048 norm relu"
PUBLISHED_HEADS = {
    "cifar10": f"{HIDDEN} 2048→2048",  # solo-learn, solo/methods/barlow_twins.py, line 51
    "cifar10-vicreg": f"{HIDDEN} 2048→2048",  # vicreg.py, line 53
    "cifar10-simsiam": f"{HIDDEN} 2048→2048 norm-without-weights",  # simsiam.py, line 48
    "cifar10-simclr": "512→2048 bias relu 2048→256 bias",  # simclr.py, line 48
    "cifar10-byol": "512→4096 norm relu 4096→256",  # byol.py, line 50
    "imagenet-simclr": "2048→2048 norm relu 2048→128 factor-norm",  # google-research/simclr, model_util.py, line 155
    "imagenet-byol": "2048→4096 norm relu 4096→256",  # Grill 2020, section 3.3
    # facebookresearch/simsiam, simsiam/builder.py, line 28
    "imagenet-simsiam": "2048→2048 norm relu 2048→2048 norm relu 2048→2048 norm-without-weights",
    # Bardes 2022, section 4.2
    "imagenet-vicreg": "2048→8192 norm relu 8192→8192 norm relu 8192→8192",
}


def told(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features}→{layer.out_features}" + (" bias" if layer.bias is not None else "")
    if isinstance(layer, nn.BatchNorm1d):
        weights = [p.requires_grad for p in (layer.weight, layer.bias) if p is not None]
        return {(): "norm-without-weights", (True, False): "factor-norm", (True, True): "norm"}[tuple(weights)]
    return {nn.ReLU: "relu"}[type(layer)]


@pytest.mark.parametrize("card", PUBLISHED_HEADS)
def test_the_cards_projectors_are_the_published_ones(card):
    """Layer by layer; biases before a batch norm are left out, which takes any shift out again."""
    config = resolved(PRESETS[card])
    features = {"resnet18": 512, "resnet50": 2048}[config.arch]
    with torch.device("meta"):
        projector = make_method(nn.Identity(), features, config).projector
    assert " ".join(map(told, projector)) == PUBLISHED_HEADS[card]


@pytest.mark.parametrize("norm", ["batch", "none", "all"])
def test_simclrs_projector_against_numpy(norm):
    """Its batch norms take both views as one batch; the one behind the last layer has a factor and no shift."""
    module = method("simclr", projector_norm=norm)
    for parameter in module.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    views = embeddings(8)
    loss, _ = module(tuple(map(torch.from_numpy, views)))
    weights = {name: p.detach().numpy() for name, p in module.state_dict().items()}
    first, last = {"none": (0, 2)}.get(norm, (0, 3))

    def normed(x: np.ndarray, at: int) -> np.ndarray:
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        return x * weights[f"projector.{at}.weight"] + weights[f"projector.{at}.bias"]

    def linear(x: np.ndarray, at: int) -> np.ndarray:
        return x @ weights[f"projector.{at}.weight"].T + weights.get(f"projector.{at}.bias", 0)

    x = linear(np.concatenate(views) @ weights["backbone.weight"].T, first)
    x = linear(np.maximum(x if norm == "none" else normed(x, 1), 0), last)
    x = normed(x, 4) if norm == "all" else x
    assert (f"projector.{last}.bias" in weights) == (norm == "none")
    assert norm != "all" or not weights["projector.4.bias"].any()
    assert loss.item() == pytest.approx(nt_xent_loss(x[:8], x[8:], 0.1), rel=1e-9)


def test_which_crops_are_bilinear():
    """torchvision's default, which SimSiam's code leaves for ImageNet; bicubic in the code of all others: Barlow Twins'
    main.py, VICReg's augmentations.py, BYOL's dataset.py, SimCLR's data_util.py, solo-learn's pretrain_dataloader.py.
    """
    for name in ("barlow_twins", "simclr", "byol", "simsiam", "vicreg"):
        for images, views in METHODS[name].VIEWS.items():
            expected = "bilinear" if (name, images) == ("simsiam", "imagenet") else "bicubic"
            assert {view.interpolation for view in views} == {expected}


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="is a card of byol"):
        resolved(replace(PRESETS["cifar10-byol"], method="simclr"))
    with pytest.raises(UserError, match="BYOL and SimSiam need one"):
        resolved(replace(PRESETS["cifar10-byol"], predictor=""))
    with pytest.raises(UserError, match="end in different widths"):
        resolved(replace(PRESETS["cifar10-byol"], predictor="64-64"))
    with pytest.raises(UserError, match="--loss invariance does not go with --method byol"):
        resolved(replace(PRESETS["cifar10-byol"], loss="invariance"))
    with pytest.raises(UserError, match="--predictor 8-5 does not go with --method vicreg, but with barlow_twins or"):
        resolved(replace(PRESETS["cifar10-vicreg"], projector="8-5", predictor="8-5"))
    with pytest.raises(UserError, match="--projector-norm none does not go with --method byol"):
        resolved(replace(PRESETS["cifar10-byol"], projector_norm="none"))
    with pytest.raises(UserError, match="--projector-norm all is SimCLR's"):
        resolved(PretrainConfig(projector_norm="all"))


def test_vicreg_is_one_small_file():
    import inspect

    import train.methods.vicreg

    assert len(inspect.getsource(train.methods.vicreg).splitlines()) < 120 and issubclass(VICReg, nn.Module)
