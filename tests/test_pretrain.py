"""The loop against a float64 reference of the whole update, and what it leaves in the run folder."""

import copy
import errno
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.storage.beton import open_beton
from tests.oracles_train import SyntheticLoader, reference_run
from train.checkpoint import load_backbone, read_checkpoint
from train.config import PretrainConfig
from train.distributed import Ranks
from train.flags import resolved
from train.guard import samples_of_step
from train.methods.barlow_twins import BarlowTwins
from train.model import make_backbone
from train.pretrain import train
from train.run_data import loader_config

CPU = Ranks(0, 1, torch.device("cpu"), None)
# Steps large enough that the weights move by tens of per cent: a wrong term would show.
TINY = PretrainConfig(
    arch="test_resnet", projector="48-32-24", resolution=16, global_batch=16, epochs=5, warmup_epochs=1, amp="off",
    lr_weights=8.0, lr_biases=0.4, weight_decay=1e-3, lars_eta=0.02, lambd=0.02, paper_world_size=1, log_every=5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def run(config: PretrainConfig, folder, loader=None) -> int:
    return train(resolved(replace(config, run=str(folder))), CPU, loader or SyntheticLoader(64, 16))


def initial(config: PretrainConfig) -> BarlowTwins:
    """The untrained network of a run: the same draws as the loop's."""
    torch.manual_seed(config.seed)
    return BarlowTwins(*make_backbone(config.arch, config.stem), config)


# In float32 a rounding error can flip a ReLU, whose gradient then differs by more than rounding, so the float32
# bar is held on a network without one; there a bias before a batch norm has no gradient but noise, so errors are
# relative to a tensor's norm or to 0.1 an entry (activations are about 1), whichever is more.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "projector", "paper_world_size", "dtype", "tolerance"),
    [
        ("test_resnet", "48-32-24", 1, torch.float64, 1e-11),
        ("test_resnet", "48-32-24", 16, torch.float64, 1e-11),
        ("test_efficientnet", "24", 1, torch.float32, 1e-5),
    ],
)
def test_twenty_steps_against_the_float64_reference(
    tmp_path, record_property, arch, projector, paper_world_size, dtype, tolerance
):
    config = replace(TINY, arch=arch, projector=projector, paper_world_size=paper_world_size, resolution=32)
    config = replace(config, lr_weights=1.0, lr_biases=0.02, lars_eta=0.03)
    loader = SyntheticLoader(64, 16, size_px=32, dtype=dtype)
    torch.set_default_dtype(dtype)
    try:
        start = initial(config)
        assert run(config, tmp_path / "r", loader) == 0
        ours = read_checkpoint(tmp_path / "r" / "checkpoint.pt")["model"]
    finally:
        torch.set_default_dtype(torch.float32)
    expected = reference_run(
        copy.deepcopy(start.backbone),
        [layer.weight for layer in start.projector[::3]],
        loader,
        20,
        lambd=config.lambd,
        lr_weights=config.lr_weights,
        lr_biases=config.lr_biases,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        eta=config.lars_eta,
        gradient_share_of_biases=1 / paper_world_size,
    )
    errors, distances = {}, []
    for name, reference in expected.items():
        scale = max(np.linalg.norm(reference), 0.1 * reference.size**0.5)
        errors[name] = np.linalg.norm(ours[name].double().numpy() - reference) / scale
        if reference.ndim > 1:
            distances.append(np.linalg.norm(start.state_dict()[name].double().numpy() - reference) / scale)
    worst = max(errors, key=errors.get)
    record_property("largest relative error", float(errors[worst]))
    assert errors[worst] < tolerance, worst
    assert np.median(distances) > 0.01  # the weights did move


def test_what_a_run_leaves_behind(tmp_path):
    assert run(TINY, tmp_path / "r") == 0
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names == {
        "checkpoint.pt", "backbone.safetensors", "config.json", "env.json", "metrics.jsonl", "loss.png", "tensorboard",
    }  # fmt: skip
    lines = [json.loads(text) for text in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]  # an epoch has fewer steps than --log-every
    assert {"loss", "on_diagonal", "off_diagonal", "diagonal_mean", "off_diagonal_rms"} <= set(lines[0])
    from_run, info = load_backbone(tmp_path / "latest")
    from_export, exported = load_backbone(tmp_path / "r" / "backbone.safetensors")
    assert (info.arch, info.resolution_px, info.step, info.epochs) == ("test_resnet", 16, 20, 5)
    assert replace(exported, sha256=info.sha256) == info
    picture = torch.randn(2, 3, 16, 16)
    assert torch.equal(from_run(picture), from_export(picture))


def test_it_learns(tmp_path):
    run(replace(TINY, epochs=12, lr_weights=1.0, lr_biases=0.1), tmp_path / "r")
    lines = [json.loads(text) for text in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["diagonal_mean"] > lines[0]["diagonal_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains(tmp_path, amp):
    loader = SyntheticLoader(64, 16, size_px=32)
    assert run(replace(TINY, amp=amp, epochs=1, resolution=32), tmp_path / "r", loader) == 0
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])
    assert all(w.dtype != torch.bfloat16 for w in read_checkpoint(tmp_path / "r" / "checkpoint.pt")["model"].values())


def test_no_epochs_leave_the_untrained_network(tmp_path):
    assert run(replace(TINY, epochs=0), tmp_path / "r") == 0
    backbone, info = load_backbone(tmp_path / "r")
    assert info.step == info.epochs == 0
    for name, weight in initial(TINY).backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight), name


def test_a_network_with_dropout_trains(tmp_path):
    assert (
        run(
            replace(TINY, arch="test_vit", resolution=160, epochs=1),
            tmp_path / "r",
            SyntheticLoader(16, 4, size_px=160),
        )
        == 0
    )


def test_a_loss_that_is_no_number_never_reaches_a_checkpoint(tmp_path):
    class Broken(SyntheticLoader):
        def global_views(self, step):
            return [v * (float("nan") if step >= 6 else 1) for v in super().global_views(step)]

    with pytest.raises(UserError, match="the loss became nan in step 7; its 16 images, .* are listed in"):
        run(replace(TINY, log_every=100, checkpoint_every_steps=4), tmp_path / "r", Broken(64, 16))
    saved = read_checkpoint(tmp_path / "r" / "checkpoint.pt")
    assert saved["step"] == 4
    assert all(w.isfinite().all() for w in saved["model"].values())


@pytest.mark.parametrize("order", ["shuffled", "blocks"])
def test_a_fraction_of_the_images_in_either_order(small_beton, order):
    """The same share of each class, and a lost step's images are those that the loader gave."""
    flags = {"data": small_beton, "resolution": 32, "global_batch": 4, "order": order, "block_images": 2}
    config = resolved(replace(TINY, fraction=0.5, window_blocks=3, seed=1, **flags))
    labels = open_beton(small_beton).labels
    chosen = loader_config(config, CPU).ids
    assert np.bincount(labels[chosen]).tolist() == [4] * 6
    assert not np.array_equal(chosen, loader_config(replace(config, seed=2), CPU).ids)
    assert loader_config(replace(config, fraction=1.0), CPU).ids is None
    loader = make_loader(loader_config(config, CPU))
    assert loader.steps_per_epoch == 6
    samples = [batch.sample.tolist() for batch in loader.batches(0, 8)]
    loader.close()
    assert np.array_equal(np.sort(np.concatenate(samples[:6])), chosen)
    assert all(samples_of_step(config, chosen, step).tolist() == part for step, part in enumerate(samples))
    with pytest.raises(UserError, match="--fraction 0"):
        loader_config(replace(config, fraction=0.0), CPU)


def test_a_checkpoint_of_another_architecture_is_refused_and_kept(tmp_path):
    run(replace(TINY, epochs=0), tmp_path / "r")
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="arch test_resnet there, resnet18 here"):
        run(replace(TINY, epochs=0, arch="resnet18"), tmp_path / "r")
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    assert run(replace(TINY, epochs=0, projector="8-8", resume="never"), tmp_path / "r") == 0


def test_a_disk_that_takes_no_checkpoint_ends_the_run_before_its_first_step(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="could not write"):
            run(TINY, tmp_path / "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "r").iterdir())
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize(
    ("by", "name", "number"),
    [
        ("os.open", ".writer", errno.EROFS),
        ("pipeline.disk.open", "checkpoint.pt", errno.EDQUOT),
        ("pipeline.disk.open", "config.json", errno.EROFS),
        ("os.open", "metrics.jsonl", errno.ENOSPC),
        ("pipeline.disk.open", "backbone.safetensors", errno.ENOSPC),
        ("pipeline.disk.open", "loss.png", errno.EIO),
    ],
)
def test_a_disk_that_refuses_a_file_of_a_run(tmp_path, monkeypatch, by, name, number):
    """A sentence names it, and the same command continues: the end is that of a run which nothing happened to."""
    module, opener = by.rsplit(".", 1)
    usual = getattr(sys.modules[module], opener, open)

    def refusing(path, *arguments, **named):
        if name in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return usual(path, *arguments, **named)

    config = replace(TINY, epochs=1, checkpoint_every_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(by, refusing, raising=False)
        with pytest.raises(UserError, match=rf"/{name}\b.*{os.strerror(number)}"):
            run(config, tmp_path / "r")
    assert run(config, tmp_path / "r") == run(config, tmp_path / "whole") == 0
    ours, whole = (read_checkpoint(tmp_path / folder / "checkpoint.pt")["model"] for folder in ("r", "whole"))
    assert all(torch.equal(weight, whole[part]) for part, weight in ours.items())


def test_a_new_run_begins_where_another_ended(tmp_path, capsys):
    """--init-from: the untrained network of the new run is the trained one of the old, its step 0."""
    assert run(replace(TINY, epochs=1), tmp_path / "first") == 0
    assert run(replace(TINY, epochs=0, seed=5, init_from=tmp_path / "first"), tmp_path / "second") == 0
    first, second = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("first", "second"))
    assert first["step"] == 4 and second["step"] == 0
    assert all(torch.equal(first["model"][name], weight) for name, weight in second["model"].items())
    assert "a new run begins with backbone and heads of" in capsys.readouterr().err
