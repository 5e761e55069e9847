"""One update is the same at any world size: gloo ranks on the CPU against one process and a float64 reference."""

import os
import resource
import shutil
import signal
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing
from torch import nn

from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.stopping import EXIT_REQUEUE
from tests.oracles_train import SyntheticLoader, barlow_loss_torch
from train.agreement import only_writer, require_same_start
from train.batchnorm import CrossRankBatchNorm
from train.checkpoint import read_checkpoint
from train.config import PretrainConfig
from train.distributed import Ranks, largest, start_ranks, stop_ranks, sum_over_ranks
from train.flags import resolved
from train.methods.barlow_twins import BarlowTwinsLoss
from train.online_linear import OnlineLinear
from train.pretrain import train

IMAGES, WIDTH = 16, 12
TINY = PretrainConfig(
    arch="test_resnet", projector="24-16", resolution=16, global_batch=16, epochs=2, warmup_epochs=1, amp="off",
    lr_weights=1.0, lr_biases=0.05, lars_eta=0.05, log_every=1,
)  # fmt: skip
pytestmark = pytest.mark.slow


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [2 * a + 1, a + torch.randn(shape, generator=generator, dtype=torch.float64)]


def share(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return x.chunk(ranks.world_size)[ranks.rank].clone().requires_grad_()


def normalized_loss(ranks: Ranks) -> dict:
    """This rank's loss, and the gradients of its rows as DistributedDataParallel's mean would weigh them."""
    rows = [share(z, ranks) for z in inputs(IMAGES, WIDTH)]
    normalize = CrossRankBatchNorm(WIDTH, affine=False, track_running_stats=False).double()
    loss = BarlowTwinsLoss.apply(*(normalize(z) for z in rows), 0.02)[0]
    loss.backward()
    return {"loss": loss.detach(), "gradients": [z.grad / ranks.world_size for z in rows]}


def batch_norm(ranks: Ranks, *shape: int, uneven: bool = False) -> dict:
    """Output, gradients and statistics of one training step of our batch norm; the weights' gradients still local.

    `uneven`: rank 0 holds what the others leave, who have two images each (detection's images differ in size).
    """
    cuts = [IMAGES - 2 * r for r in range(ranks.world_size - 1, 0, -1)]
    parts = [x.tensor_split(cuts if uneven else ranks.world_size)[ranks.rank] for x in inputs(IMAGES, *shape)]
    x, weight = parts[0].clone().requires_grad_(), parts[1]
    norm = CrossRankBatchNorm(shape[0]).double()
    nn.init.constant_(norm.weight, 1.5)
    out = norm(x)
    (out * weight).sum().backward()
    return {"out": out.detach(), "x": x.grad, "weight": norm.weight.grad, "state": norm.state_dict()}


def online_linear(ranks: Ranks) -> dict:
    """The layer beside the encoder after three steps on this rank's share of both views."""
    config = PretrainConfig(global_batch=IMAGES)
    linear = OnlineLinear(WIDTH, 3, config, adapt=True, device=torch.device("cpu"))
    linear.layer.double()
    labels = torch.arange(IMAGES).mul(7) % 3
    for share in (0.1, 1.0, 0.5):
        linear.step(
            [z.chunk(ranks.world_size)[ranks.rank] for z in inputs(IMAGES, WIDTH)],
            labels.chunk(ranks.world_size)[ranks.rank],
            share,
        )
    return linear.layer.state_dict()


class SignalledLoader(SyntheticLoader):
    """The last rank alone gets SIGTERM, before its second step."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == 1 and self.rank == self.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def run(folder: Path, ranks: Ranks, dtype: torch.dtype, kind=SyntheticLoader, **flags) -> int:
    torch.set_default_dtype(dtype)
    loader = kind(48, 16, ranks.rank, ranks.world_size, dtype=dtype)
    code = train(resolved(replace(TINY, run=str(folder), **flags)), ranks, loader)
    torch.set_default_dtype(torch.float32)
    return code


def smooth_backbone(arch: str, stem: str) -> tuple[nn.Module, int]:
    """Without ReLUs: a rounding error cannot flip one, so float32 runs stay together."""
    return timm.create_model("test_resnet", num_classes=0, act_layer=nn.SiLU), 96


def smooth_run(folder: Path, ranks: Ranks, **flags) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.update.make_backbone", smooth_backbone)
        return run(folder, ranks, torch.float32, projector="16", **flags)


def run_without_disk(folder: Path, ranks: Ranks) -> str:
    """The way a rank ends when rank 0 may not write the first checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        return f"code {run(folder, ranks, torch.float32)}"
    except (UserError, SystemExit) as end:
        return f"{type(end).__name__} {end}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def end_of_start(ranks: Ranks, begin) -> str:
    """How a start ends on this rank."""
    try:
        begin()
        return "begun"
    except (UserError, SystemExit) as end:
        return f"{type(end).__name__} {end}"


def started_alike(ranks: Ranks, images: str = "", **flags) -> str:
    config = replace(TINY, data=Path(f"/{ranks.rank}"), workers=ranks.rank, **flags)  # which may differ
    return end_of_start(ranks, lambda: require_same_start(ranks, config, images))


def asked_for(folder: Path, ranks: Ranks) -> str:
    """The right to write a run: taken by the test's process; and left behind by another machine, watched in vain."""

    def begin():
        with only_writer(folder, ranks, "the run") as writer:
            assert (writer is not None) == (ranks.rank == 0)

    return end_of_start(ranks, begin)


def one_rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    """Everything a rank is asked, in one process: starting one costs more than all of it."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    import pipeline.one_writer
    import train.agreement
    import train.runlog

    train.runlog.RUNS = folder
    pipeline.one_writer.WATCH_S, train.agreement.ASK_S = 0.5, 0.1
    ranks = start_ranks()
    x = torch.tensor([float(rank + 1)], requires_grad=True)
    total = sum_over_ranks(x)
    ((rank + 1) * total).sum().backward()
    found = {
        "sum": total.detach(),
        "sum gradient": x.grad,
        "largest": largest(ranks, 10 - rank),
        "loss": normalized_loss(ranks),
        "bn 2d": batch_norm(ranks, 5, 3, 2),
        "bn 1d": batch_norm(ranks, 5),
        "online linear": online_linear(ranks),
        "bn uneven": batch_norm(ranks, 5, 3, 2, uneven=True),
        "float64": run(folder / "float64", ranks, torch.float64),
        "float32": smooth_run(folder / "float32", ranks),
        "recomputed": run(folder / "recomputed", ranks, torch.float64, activations="blocks"),
        "no disk": run_without_disk(folder / "full", ranks),
        "alike": started_alike(ranks, "same", seed=3),
        "other flags": started_alike(ranks, "same", seed=min(rank, 1), lr_weights=0.5 if rank else 0.25),
        "other images": started_alike(ranks, "a" * 64 if rank else "b" * 64),
        "taken": asked_for(folder / "taken", ranks),
        "left": asked_for(folder / "left", ranks),
        "signalled": run(folder / "signalled", ranks, torch.float64, SignalledLoader),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    stop_ranks()


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory, training_forkserver) -> tuple[int, Path, list[dict]]:
    """(world size, folder, what each rank found)."""
    folder = tmp_path_factory.mktemp(f"w{request.param}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (request.param, port, folder)
    for name in ("taken", "left"):
        (folder / name).mkdir()
    (folder / "left" / ".writer").write_text('{"pid": 1, "host": "elsewhere", "since": "then", "machine": "other"}')
    with OneWriter(folder / "taken" / ".writer", "it"):
        torch.multiprocessing.start_processes(one_rank, arguments, nprocs=request.param, start_method="forkserver")
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]
    return request.param, folder, found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The same runs in this process, with torch's own batch norm."""
    folder = tmp_path_factory.mktemp("w1")
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.runlog.RUNS", folder)
        assert run(folder / "float64", ranks, torch.float64) == 0
        assert smooth_run(folder / "float32", ranks) == 0
        assert run(folder / "float64 start", ranks, torch.float64, epochs=0) == 0
        assert smooth_run(folder / "float32 start", ranks, epochs=0) == 0
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: w.double().numpy() for name, w in read_checkpoint(folder / "checkpoint.pt")["model"].items()}


def test_sum_and_its_gradient(several):
    """Rank r takes r + 1 times the sum, so what it put in gets the gradient 1 + 2 + … + W."""
    world_size, _, found = several
    total = world_size * (world_size + 1) / 2
    assert all(rank["sum"].item() == rank["sum gradient"].item() == total for rank in found)
    assert all(rank["largest"] == 10 for rank in found)


def test_loss_and_gradient(several):
    _, _, found = several
    z1, z2 = (z.requires_grad_() for z in inputs(IMAGES, WIDTH))
    expected = barlow_loss_torch(z1, z2, 0.02)
    expected.backward()
    assert [rank["loss"]["loss"].item() for rank in found] == pytest.approx([expected.item()] * len(found), rel=1e-12)
    for i, z in enumerate((z1, z2)):
        gradient = torch.cat([rank["loss"]["gradients"][i] for rank in found])
        torch.testing.assert_close(gradient, z.grad, rtol=1e-10, atol=1e-14)


def test_the_linear_layer_beside_the_encoder(several):
    _, _, found = several
    expected = online_linear(Ranks(0, 1, torch.device("cpu"), None))
    for rank in found:
        for name, value in expected.items():
            torch.testing.assert_close(rank["online linear"][name], value, rtol=1e-12, atol=1e-14)
            assert torch.equal(rank["online linear"][name], found[0]["online linear"][name])


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("bn 2d", (5, 3, 2), nn.BatchNorm2d),
        ("bn 1d", (5,), nn.BatchNorm1d),
        ("bn uneven", (5, 3, 2), nn.BatchNorm2d),
    ],
)
def test_batch_norm(several, name, shape, kind):
    _, _, found = several
    x, weight = inputs(IMAGES, *shape)
    x.requires_grad_()
    norm = kind(5).double()
    nn.init.constant_(norm.weight, 1.5)
    out = norm(x)
    (out * weight).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(torch.cat([rank[name]["out"] for rank in found]), out.detach())
    close(torch.cat([rank[name]["x"] for rank in found]), x.grad)
    close(sum(rank[name]["weight"] for rank in found), norm.weight.grad)
    for rank in found:
        for key, value in norm.state_dict().items():
            close(rank[name]["state"][key], value)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_weights_after_six_steps(several, one, record_property, dtype, tolerance):
    """Network, projector, batch norm's statistics, loss, DDP, LARS and schedule together."""
    _, folder, found = several
    assert all(rank[dtype] == 0 for rank in found)
    ours, expected, start = weights(folder / dtype), weights(one / dtype), weights(one / f"{dtype} start")
    parameters = [name for name in expected if "running" not in name and "num_batches" not in name]
    record_property("relative difference to one process", float(distance(ours, expected, expected)))
    for names in (parameters, expected):
        assert distance(ours, expected, names) < tolerance
        assert distance(start, expected, names) > 1e-3  # the weights did move


def test_activations_computed_again_give_the_same_bits(several):
    """Batch norm talks to the other ranks once more in the backward pass."""
    _, folder, found = several
    assert all(rank["recomputed"] == 0 for rank in found)
    ours, expected = weights(folder / "recomputed"), weights(folder / "float64")
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def distance(a: dict, b: dict, names) -> float:
    """‖a − b‖ / ‖b‖ over all the named tensors."""
    return np.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in names) / sum((b[n] ** 2).sum() for n in names))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(several):
    _, folder, found = several
    assert [rank["signalled"] for rank in found] == [EXIT_REQUEUE] * len(found)
    assert read_checkpoint(folder / "signalled" / "checkpoint.pt")["step"] == 3


def test_another_world_size_goes_on_with_the_run(several, one, tmp_path, monkeypatch):
    """Stopped after three of six steps on several ranks, ended by one process."""
    _, folder, _ = several
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    shutil.copytree(folder / "signalled", tmp_path / "r")
    assert run(tmp_path / "r", Ranks(0, 1, torch.device("cpu"), None), torch.float64) == 0
    ours, expected = weights(tmp_path / "r"), weights(one / "float64")
    assert distance(ours, expected, expected) < 1e-12


def test_no_rank_waits_for_one_that_could_not_write(several):
    _, _, (first, *others) = several
    assert first["no disk"].startswith("UserError could not write")
    assert all(rank["no disk"] == "SystemExit 2" for rank in others)


def test_ranks_with_other_flags_or_images_do_not_begin(several):
    _, _, (first, *others) = several
    ranks = "rank 1" if len(others) == 1 else "ranks 1, 2, 3"
    assert all(rank["alike"] == "begun" for rank in (first, *others))
    sentence = f"--lr-weights is 0.25 on rank 0 and 0.5 on {ranks}; --seed is 0 on rank 0 and 1 on {ranks}"
    assert first["other flags"].startswith("UserError the ranks were not started alike: ")
    assert all(part in first["other flags"] for part in sentence.split("; "))
    assert f"images of --data is {'b' * 12} on rank 0 and {'a' * 12} on {ranks};" in first["other images"]
    assert all(rank[name] == "SystemExit 2" for rank in others for name in ("other flags", "other images"))


def test_all_ranks_end_where_another_process_writes_the_run(several):
    _, folder, (first, *others) = several
    assert first["taken"].startswith(
        f"BusyError the run {folder / 'taken'} is being written by process {os.getpid()} on"
    )
    assert all(rank["taken"] == "SystemExit 2" for rank in others)
    assert all(rank["left"] == "begun" for rank in (first, *others)), "its writer gave no sign of life"
    assert not list((folder / "taken").iterdir()) and not list((folder / "left").iterdir())
