"""What only a GPU can show of a whole run: resume to the bit, compile, NCCL, large buffers, DALI's own decoder."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipeline.choices.draws import draw_views
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig, Normalization
from tests.evaluation import write_dataset
from tests.test_recorded import TINY, GpuLoader
from tests.test_resume import bits
from train.checkpoint import read_checkpoint
from train.distributed import Ranks
from train.flags import resolved
from train.methods.barlow_twins import BarlowTwins
from train.model import make_backbone
from train.pretrain import EXIT_FINISHED, train

pytestmark = pytest.mark.gpu
REPO = Path(__file__).resolve().parents[1]
FLAGS = "--arch resnet18 --stem small --projector 64-64 --resolution 32 --views cifar10 --global-batch 50 --epochs 12"
FLAGS += " --warmup-epochs 1 --checkpoint-every-steps 3 --workers 2 --deterministic --log-every 1"


def start(data: Path, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, REPO / "train" / "pretrain.py", *FLAGS.split(), "--data", data, "--run", folder, *flags]
    return subprocess.Popen([str(part) for part in command], cwd=REPO, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("flags", [(), ("--cuda-graph",)], ids=["plain", "graph"])
@pytest.mark.parametrize("loader", ["fast", "resident"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, loader, flags):
    """SIGKILL in the middle; and the accuracies measured beside the steps of the second run leave no trace."""
    if "--cuda-graph" in flags and loader == "fast":
        pytest.skip("one loader is enough for the graph, whose first steps after a start are ordinary ones")
    data = write_dataset(tmp_path / "data")
    whole = start(data, tmp_path / "whole", "--loader", loader, *flags)
    assert whole.wait(300) == 0, whole.stderr.read()
    cut = start(data, tmp_path / "cut", "--loader", loader, "--knn-every", "2", *flags)
    lines = tmp_path / "cut" / "metrics.jsonl"
    while cut.poll() is None and not (lines.exists() and len(lines.read_text().splitlines()) > 20):
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL
    again = start(data, tmp_path / "cut", "--loader", loader, "--knn-every", "2", *flags)
    assert again.wait(300) == 0, again.stderr.read()
    ends = [read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    if flags:  # the same kernels, three steps of them started one by one again: the bits are not promised
        for name, weight in ends[0]["model"].items():
            distance = (ends[1]["model"][name] - weight).float().norm() / weight.float().norm().clamp(min=1)
            assert distance < 5e-2, name
    else:
        assert bits(ends[0]) == bits(ends[1])
    assert any("knn_top1" in json.loads(text) for text in lines.read_text().splitlines())


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_compiled_is_the_same_network(tmp_path, monkeypatch, same_arithmetic, amp):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    losses = {}
    for compiled in (False, True):
        config = replace(TINY, amp=amp, compile=compiled, run=str(tmp_path / str(compiled)), epochs=2)
        config = replace(config, arch="test_resnet", stem="imagenet")  # small: compiling is what takes the time
        assert train(resolved(config), Ranks(0, 1, torch.device("cuda", 0), None), GpuLoader(64, 16)) == EXIT_FINISHED
        lines = (tmp_path / str(compiled) / "metrics.jsonl").read_text().splitlines()
        losses[compiled] = [json.loads(text)["loss"] for text in lines]
    assert np.isfinite(losses[True]).all()
    assert np.allclose(losses[True][:3], losses[False][:3], rtol=0.02 if amp == "off" else 0.1)


def test_nccl_with_one_rank(tmp_path, same_arithmetic):
    """DistributedDataParallel and the loss over a real NCCL group: the gradients of one process without any."""
    views = next(iter(GpuLoader(64, 16).batches(0, 2))).views

    def gradients(wrap) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method = BarlowTwins(*make_backbone("resnet18", "small"), resolved(TINY)).cuda()
        wrap(method)(views)[0].backward()
        return {name: p.grad.clone() for name, p in method.named_parameters()}

    plain = gradients(lambda method: method)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        ours = gradients(lambda method: DistributedDataParallel(method, device_ids=[0], gradient_as_bucket_view=True))
    finally:
        dist.destroy_process_group()
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_images_beyond_two_gibibytes():
    """A resident set is one buffer: images past byte 2³¹ are read where they lie."""
    from pipeline.views.augment_gpu import make_views
    from pipeline.views.gpu_plan import plan_views

    rng, sizes = np.random.default_rng(0), np.array([90, 70, 110])
    images = torch.from_numpy(rng.integers(0, 256, int((sizes**2).sum()) * 3, np.uint8))
    starts = np.cumsum(sizes**2 * 3) - sizes**2 * 3
    params = draw_views(0, 0, np.arange(3), sizes, sizes, BARLOW_TWINS_VIEWS, 64)
    buffer, found = torch.full((2**31 + 2**20 + len(images),), 77, dtype=torch.uint8, device="cuda"), []
    for first in (0, 2**31 + 2**20 - 5):
        buffer[first : first + len(images)] = images.cuda()
        plan = plan_views(params, starts + first, sizes, sizes, ["bicubic"] * 2, 64).to("cuda")
        found.append(make_views(buffer, plan, Normalization(), torch.float32))
    assert all(torch.equal(near, far) for near, far in zip(*found, strict=True))


def test_dalis_decoder_on_the_gpu(small_beton):
    """Samples, order and draws are those of the fast loader; nvJPEG's pixels differ by little."""
    pytest.importorskip("nvidia.dali")
    config = LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, 64, global_batch=16, seed=5, workers=2, device="cuda")
    loaders = [make_loader(replace(config, backend=backend)) for backend in ("fast", "dali")]
    for one, other in zip(*(loader.batches(0, 5) for loader in loaders), strict=True):
        assert torch.equal(one.sample, other.sample) and torch.equal(one.label, other.label)
        for view, near in zip(one.views, other.views, strict=True):
            levels = (view - near).abs() * 0.226 * 255
            assert levels.mean() < 2, f"{levels.mean():.2f} levels of 255 apart"
    for loader in loaders:
        loader.close()
