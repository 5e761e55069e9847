"""The linear layer trained beside the encoder: solo-learn's steps, no trace in the encoder, whole after a resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.oracles_train import lars_step
from tests.test_resume import CPU, Killed, StoppingLoader, end_of, run
from tests.test_together import HEADS
from train.cards import PRESETS
from train.checkpoint import read_checkpoint
from train.config import METHOD_NAMES, PretrainConfig
from train.flags import resolved
from train.lars import LARS
from train.online_linear import OnlineLinear
from train.pretrain import EXIT_FINISHED
from train.update import Update, make_update

CLASSES, WIDTH, IMAGES = 3, 5, 8


def layer(*, adapt: bool, global_batch: int = 512) -> OnlineLinear:
    config = PretrainConfig(seed=4, global_batch=global_batch)
    linear = OnlineLinear(WIDTH, CLASSES, config, adapt=adapt, device=torch.device("cpu"))
    linear.layer.double()
    return linear


def views_and_labels(step: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=(IMAGES, WIDTH)) for _ in range(2)], rng.integers(0, CLASSES, IMAGES)


def gradients_by_hand(weight, bias, views, labels) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean of both views' cross-entropies (solo/methods/base.py, line 521), view by view."""
    of_weight, of_bias = np.zeros_like(weight), np.zeros_like(bias)
    for view in views:
        scores = np.exp(view @ weight.T + bias)
        error = (scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[labels]) / len(labels) / len(views)
        of_weight, of_bias = of_weight + error.T @ view, of_bias + error.sum(0)
    return of_weight, of_bias


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_the_steps_are_solo_learns(adapt, together):
    """Learning rate 0.1 × batch / 256, LARS with η 0.02 clipped for the weight or plain SGD, no decay; in float64."""
    linear = layer(adapt=adapt)
    weight, bias = (p.detach().numpy().copy() for p in linear.layer.parameters())
    assert abs(weight).max() <= WIDTH**-0.5 and len({*weight.ravel(), *bias}) == CLASSES * (WIDTH + 1)
    momenta, lr_shares = [np.zeros_like(weight), np.zeros_like(bias)], (0.0, 0.5, 1.0, 0.3)
    for step, share in enumerate(lr_shares):
        views, labels = views_and_labels(step)
        g = gradients_by_hand(weight, bias, views, labels)
        lr, rules = 0.2 * share, {"weight_decay": 0.0, "eta": 0.02, "clip": True}
        # At the rate 0 the clipped trust is 1, as 0.02 ‖p‖/‖g‖ / lr grows without bound.
        plain = not adapt or share == 0
        weight, momenta[0] = lars_step(weight, g[0], momenta[0], lr, is_bias=plain, **rules)
        bias, momenta[1] = lars_step(bias, g[1], momenta[1], lr, is_bias=True, **rules)
        rows = [torch.from_numpy(view) for view in views]
        linear.step([torch.cat(rows)] if together else rows, torch.from_numpy(labels), share)
    np.testing.assert_allclose(linear.layer.weight.detach(), weight, rtol=1e-12)
    np.testing.assert_allclose(linear.layer.bias.detach(), bias, rtol=1e-12)


def update_of(name: str, classes: int, **flags) -> Update:
    projector, predictor = HEADS.get(name, ("24-16", ""))
    card = PRESETS["cifar10-demo" if name == "barlow_twins" else f"cifar10-demo-{name}"]
    config = replace(card, arch="resnet10_narrow", projector=projector, predictor=predictor, global_batch=IMAGES)
    return make_update(resolved(replace(config, run="x", **flags)), CPU, steps_per_epoch=4, classes=classes)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("together", [False, True])
def test_the_encoder_has_the_bits_of_a_run_without_it(name, together):
    """Weights, statistics, momentum, metrics and random numbers; and it learned from what the backbone put out."""
    labels, ends, put_out = torch.arange(IMAGES) % CLASSES, [], []
    for classes in (0, CLASSES):
        update = update_of(name, classes, views_together=together)
        update.method.backbone.register_forward_hook(lambda module, given, out: put_out.append(out.detach().clone()))
        before = update.linear and update.linear.layer.weight.detach().clone()
        for step in range(3):
            put_out.clear()
            generator = torch.Generator().manual_seed(step)
            views = tuple(torch.randn(IMAGES, 3, 16, 16, generator=generator) for _ in range(2))
            metrics = update(views, step, labels)
        optimizer = [update.optimizer.state[p]["momentum"] for g in update.optimizer.param_groups for p in g["params"]]
        ends.append([*update.method.state_dict().values(), *optimizer, *metrics.values(), torch.get_rng_state()])
    assert len(ends[0]) == len(ends[1]) and all(map(torch.equal, *ends))
    assert torch.equal(torch.cat(update.method.features), torch.cat(put_out)) and len(put_out[0]) % IMAGES == 0
    assert update.linear.optimizer.param_groups[0]["adapt"] == (name not in ("simsiam", "moco_v2"))
    assert (update.linear.layer.weight - before).abs().max() > 1e-5
    assert not {id(p) for p in update.linear.layer.parameters()} & {id(p) for p in update.method.parameters()}


class Labelled(StoppingLoader):
    """With labels that are not all the same."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            yield batch._replace(label=(batch.sample + batch.step) % CLASSES)


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    """Its weights and momentum are in the checkpoint; one without them is resumed all the same, with a note."""
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    assert run(tmp_path / "plain", Labelled(), epochs=2) == EXIT_FINISHED
    with pytest.raises(Killed):
        run(tmp_path / "begun without", Labelled(7), epochs=2)
    monkeypatch.setattr("train.pretrain.classes_beside", lambda config: CLASSES)
    assert run(tmp_path / "whole", Labelled(), epochs=2) == EXIT_FINISHED
    with pytest.raises(Killed):
        run(tmp_path / "cut", Labelled(7), epochs=2)
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 5
    assert run(tmp_path / "cut", Labelled(), epochs=2) == EXIT_FINISHED
    whole = end_of(tmp_path / "whole")
    assert end_of(tmp_path / "cut") == whole and whole["online_linear"]["optimizer"]["state"]
    assert "no linear layer" not in capsys.readouterr().err

    assert run(tmp_path / "begun without", Labelled(), epochs=2) == EXIT_FINISHED
    assert capsys.readouterr().err.count("has no linear layer for linear_top1; it begins at random weights") == 1
    digests = ("content_sha256", "backbone", "config")
    plain, late = (
        {k: v for k, v in end_of(tmp_path / n).items() if k not in digests} for n in ("plain", "begun without")
    )
    assert late.pop("online_linear") != whole["online_linear"] and late == plain, "and no trace without it"


def test_a_step_that_is_left_out_does_not_reach_it():
    """With --on-nan skip: features that are not finite would stay in its weights for good."""
    update = update_of("barlow_twins", CLASSES, on_nan="skip")
    before = [p.detach().clone() for p in update.linear.layer.parameters()]
    views = tuple(torch.full((IMAGES, 3, 16, 16), torch.nan) for _ in range(2))
    update.guard.ids = np.arange(4 * IMAGES)
    assert update(views, 1, torch.zeros(IMAGES, dtype=torch.int64)) is None
    assert all(map(torch.equal, before, update.linear.layer.parameters()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_it_steps_on_what_a_compiled_backbone_leaves():
    """As --compile compiles it, part by part."""
    torch._dynamo.reset()
    plain, compiled = (update_of("barlow_twins", CLASSES) for _ in range(2))
    for part in compiled.method.children():
        part.compile(dynamic=False, backend="eager")
    views = tuple(torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for update in (plain, compiled):
        update(views, 1, torch.arange(IMAGES) % CLASSES)
    torch.testing.assert_close(plain.linear.layer.weight, compiled.linear.layer.weight)
    torch._dynamo.reset()


def test_it_has_lars_of_its_own():
    linear = layer(adapt=True)
    assert isinstance(linear.optimizer, LARS) and (linear.optimizer.eta, linear.optimizer.clip) == (0.02, True)
    assert linear.peak_lr == pytest.approx(0.1 * 512 / 256)
    assert not any(group["weight_decay"] for group in linear.optimizer.param_groups)
