"""The rivals through the whole loop: the same update on two, on four ranks and on one; resumed as if never stopped."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from tests.oracles_train import SyntheticLoader
from tests.test_ablations import ABLATIONS
from tests.test_methods import WIDTH, embeddings, method
from train.batchnorm import with_global_batch_norm
from train.cards import PRESETS
from train.checkpoint import BACKBONE, read_checkpoint
from train.config import METHOD_NAMES
from train.distributed import Ranks, mean_over_ranks, start_ranks, stop_ranks, world_size
from train.flags import resolved
from train.pretrain import train

pytestmark = pytest.mark.slow
IMAGES = 8


HEADS = {f"simclr {norm}": {"projector_norm": norm} for norm in ("all", "none")}  # its two cards'
NAMES = (*METHOD_NAMES, *ABLATIONS, *HEADS)


def gradients(name: str, rank: int) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients of two steps on a rank's share, averaged as under DistributedDataParallel, buffers.

    The weights stay, but what follows them moves in between, and MoCo's second step sees the first one's keys.
    """
    flags = (ABLATIONS | HEADS).get(name, {})
    module = with_global_batch_norm(method("barlow_twins" if name in ABLATIONS else name.split()[0], **flags))
    for step in range(2):
        views = embeddings(IMAGES, WIDTH, seed=step)
        loss, metrics = module(tuple(torch.from_numpy(z).chunk(world_size())[rank] for z in views))
        loss.backward()
        module.after_step(step, 9)
    local = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    averaged = {n: mean_over_ranks({n: g.flatten()})[n].view_as(g) for n, g in local.items()}
    return averaged | {"loss": metrics["loss"]} | dict(module.named_buffers())


def one_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    start_ranks()
    torch.save({name: gradients(name, rank) for name in NAMES}, folder / f"{rank}.pt")
    stop_ranks()


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory, training_forkserver) -> list[dict]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (request.param, port, folder)
    torch.multiprocessing.start_processes(one_rank, arguments, nprocs=request.param, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_several_ranks_make_the_update_of_one(several, name):
    expected = gradients(name, 0)
    for of_rank in several:
        assert set(of_rank[name]) == set(expected)
        for key, value in expected.items():
            # Where a method does not train a shift that batch norm takes out again, both are rounding errors.
            torch.testing.assert_close(of_rank[name][key], value, rtol=1e-9, atol=1e-13)


class Broken(Exception):
    """What a loader might raise."""


class Breaking(SyntheticLoader):
    """Ends the run in the middle of its second epoch, with the checkpoint of the first written."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == 6:
                raise Broken
            yield batch


def run(folder: Path, name: str, kind=SyntheticLoader) -> dict:
    heads = {"byol": ("24-16", "24-16"), "simsiam": ("24-16", "8-16")}.get(name, ("24-16", ""))
    card = PRESETS["cifar10-demo" if name == "barlow_twins" else f"cifar10-demo-{name}"]
    config = replace(card, arch="test_resnet", projector=heads[0], predictor=heads[1], resolution=16, global_batch=8)
    config = replace(config, epochs=3, run=str(folder), log_every=1, checkpoint_every_steps=4)
    config = replace(config, queue=min(20, config.queue))
    train(resolved(config), Ranks(0, 1, torch.device("cpu"), None), kind(images=32, global_batch=8))
    return read_checkpoint(folder / "checkpoint.pt")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_resumed_it_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    straight = run(tmp_path / "straight", name)
    with pytest.raises(Broken):
        run(tmp_path / "stopped", name, Breaking)
    assert read_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 4
    resumed = run(tmp_path / "stopped", name)
    assert resumed["step"] == straight["step"] == 12
    assert set(resumed["model"]) == set(straight["model"])
    for key, value in straight["model"].items():
        assert torch.equal(resumed["model"][key], value), key
    exported = load_file(tmp_path / "straight" / BACKBONE)
    assert exported, "the trained backbone and no other"
    assert all(torch.equal(straight["model"][f"backbone.{key}"], value) for key, value in exported.items())
