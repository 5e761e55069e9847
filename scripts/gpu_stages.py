"""The measurements of scripts/gpu_report.sh, one a call: what each of them does, and the record it leaves.

    python scripts/gpu_stages.py --stages kernels step --data FOLDER --cifar FOLDER --out FOLDER

    kernels          both views of a batch by the Triton kernels, beside the measured bandwidth of a plain copy
    step             the model's step on synthetic images, ours and the published way in turn
    loader-ffcv …    the step on real images and on synthetic ones in turn: the same network, the same cores
    cifar10-speed    the step of --preset cifar10 with --compile and --cuda-graph or without, resident images

Ratios are of measurements in one process, turn by turn. `--dry-run` does all of it at toy size on the CPU: its numbers
mean nothing. The published way (facebookresearch/barlowtwins): fp16 autocast with a loss scaler, NCHW, not compiled,
LARS as a loop over parameters, Pillow and torchvision in DataLoader processes.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from bench_step import SYNTHETIC, Bench, BenchConfig, device_name, interval, record

from pipeline.beton import open_beton
from pipeline.command import UserError, run_command
from pipeline.disk import write_whole
from pipeline.draws import draw_views
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, Normalization
from train.cards import PRESETS, resolved
from train.distributed import Ranks, start_ranks
from train.run_data import loader_config

LOADERS = ("resident", "ffcv", "dali", "torch")
STAGES = ("kernels", "step", *(f"loader-{name}" for name in LOADERS), "cifar10-speed")
CORES = {"resident": (1, 2, 4), "ffcv": (1, 2, 4, 8), "dali": (2, 4)}  # torch: all there are
GB = 1e9


@dataclass(frozen=True)
class StageConfig:
    """Which measurement, on what."""

    stages: tuple[Literal[STAGES], ...]
    out: Path
    """Folder for the records, one STAGE.json each."""
    data: Path
    """A folder with train.beton of photographs."""
    cifar: Path
    """A folder with train.beton of CIFAR-10."""
    dry_run: bool = False
    """Toy size, CPU."""


# ---- the view kernels ----


def moved_bytes(plan, bytes_per_value: int) -> dict[str, int]:
    """What the kernels read and write for a plan, and what no design could save: the boxes in, the views out."""
    from pipeline.resample_gpu import FIELDS

    table = dict(zip(FIELDS, plan.table.cpu().numpy().T, strict=True))
    views, side = len(plan.table), plan.side_px
    blurred = int(table["blur"].sum())
    boxes = int((table["box_height"] * table["box_width"] * 3).sum())
    plane, view = 3 * side * plan.pitch_bytes, 3 * side * side * bytes_per_value
    resize = boxes + 2 * plan.between_bytes + 3 * plan.taps * side * 4
    colours = 2 * views * plane + (views - blurred) * view + blurred * plane
    blur = blurred * (3 * plane + view)
    return {"moved_bytes": resize + colours + blur, "least_bytes": boxes + views * view}


def timed_ms(work: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat; on a GPU between events, after three that warm up."""
    cuda, found = torch.cuda.is_available(), []
    warm_up = 3 if cuda else 0
    for _ in range(repeats + warm_up):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            work()
            found.append(1000 * (time.perf_counter() - start))
    return found[warm_up:]


def copy_bandwidth(size_bytes: int, repeats: int, device: torch.device) -> float:
    """Bytes a second, those read and those written together, of a plain copy on the device."""
    source, target = torch.randint(256, (2, size_bytes // 2), dtype=torch.uint8, device=device)
    return 1000 * size_bytes / float(np.median(timed_ms(lambda: target.copy_(source), repeats)))


def measure_kernels(config: StageConfig, ranks: Ranks) -> dict:
    from pipeline.augment_gpu import make_views
    from pipeline.loader_resident import ResidentLoader
    from pipeline.resample_gpu import plan_views

    images, side, repeats = (1, 8, 2) if config.dry_run else (1024, 224, 20)
    beton = open_beton(config.data / "train.beton")
    card = replace(PRESETS["imagenet"], data=config.data, resolution=side, global_batch=images, loader="resident")
    loader = ResidentLoader(replace(loader_config(card, ranks), views_on="gpu", ids=np.arange(images)))
    pixels, ids = loader._pixels, loader.ids
    heights, widths = beton.heights[ids], beton.widths[ids]
    bandwidth = copy_bandwidth((1 << 20) if config.dry_run else (4 << 30), repeats, ranks.device)
    found = {"images": images, "views": 2, "side_px": side, "copy_gb_per_s": round(bandwidth / GB, 1)}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        plans, plan_ms = [], []
        for epoch in range(4):  # several, so that no cache holds what a step would not find there
            start = time.perf_counter()
            params = draw_views(0, epoch, ids, heights, widths, BARLOW_TWINS_VIEWS, side)
            plans.append(plan_views(params, loader._starts[ids], heights, widths, ["bicubic"] * 2, side))
            plan_ms.append(1000 * (time.perf_counter() - start))
        on_device = [plan.to(ranks.device) for plan in plans]
        turn = iter(range(1 << 30))
        ms = timed_ms(
            lambda d=dtype, p=on_device, t=turn: make_views(pixels, p[next(t) % 4], Normalization(), d), repeats
        )
        total = moved_bytes(plans[0], dtype.itemsize)
        share = {key: round(value / (np.median(ms) / 1000) / bandwidth, 3) for key, value in total.items()}
        found[name] = {
            "ms": interval(ms),
            **total,
            "share_of_copy_bandwidth": share["moved_bytes"],
            "share_of_copy_bandwidth_if_nothing_were_moved_twice": share["least_bytes"],
            "plan_on_cpu_ms": round(float(np.median(plan_ms)), 2),
        }
    loader.close()
    return found


# ---- the step ----


class LoopLARS(torch.optim.Optimizer):
    """LARS as published code does it: parameter by parameter, each with kernels of its own."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    norm, update_norm = p.norm(), update.norm()
                    one = torch.ones_like(norm)
                    wanted = torch.where(update_norm > 0, 0.001 * norm / update_norm, one)
                    update = update.mul(torch.where(norm > 0, wanted, one))
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(update)
                p.add_(momentum, alpha=-group["lr"])


class PublishedBench(Bench):
    """The published way's step."""

    MEMORY_FORMAT = torch.contiguous_format

    def _optimizer(self) -> torch.optim.Optimizer:
        return LoopLARS(self.method.parameter_groups())

    def _loss(self, model, views):
        return super()._loss(model, [view.contiguous() for view in views])


def bench_config(config: StageConfig, cifar: bool = False, **flags) -> BenchConfig:
    """The card of a measurement, at its real or at toy size."""
    card = asdict(PRESETS["cifar10" if cifar else "imagenet"]) | {"steps": 20 if cifar else 10, "compile": True}
    card |= {"global_batch": 256 if cifar else 1024}
    if config.dry_run:
        card |= {"arch": "test_resnet", "stem": "imagenet", "projector": "16-16", "resolution": 32, "global_batch": 4}
        card |= {"steps": 1, "compile": False, "workers": 1}
    given = BenchConfig(**card | {"data": SYNTHETIC} | flags)
    return replace(resolved(given), data=given.data)


def summary(bench: Bench, runs: list[dict[str, float]]) -> dict:
    """Of some calls of `together`: speed, share of the data's wait, MFU."""
    found = record(bench, [run | {"data_wait_share": run["data_wait"] / run["step"]} for run in runs])
    stages = found["stages_ms"]
    return {key: found[key] for key in ("images_per_s", "mfu", "tera_operations_a_step_and_rank")} | {
        "step_ms": stages["step"],
        "data_wait_share": stages["data_wait_share"],
    }


def in_turn(turns: dict[str, Callable[[], dict[str, float]]], config: StageConfig) -> dict[str, list[dict[str, float]]]:
    """One unmeasured round, then five; and of each turn the GPU memory it needed, GB."""
    found = {name: [] for name in turns}
    for repeat in range(-1, 2 if config.dry_run else 5):
        for name, run in turns.items():
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            values = run()
            if torch.cuda.is_available():
                values["memory_gb"] = torch.cuda.max_memory_allocated() / GB
            if repeat >= 0:
                found[name].append(values)
    return found


def ratio(of: list[dict[str, float]], to: list[dict[str, float]]) -> dict[str, float]:
    """Speed of one way ÷ that of another, turn by turn."""
    return interval([other["step"] / one["step"] for one, other in zip(of, to, strict=True)])


def memory_gb(runs: list[dict[str, float]]) -> float | None:
    return round(max(run.pop("memory_gb") for run in runs), 2) if "memory_gb" in runs[0] else None


def measure_step(config: StageConfig, ranks: Ranks) -> dict:
    ours = Bench(bench_config(config), ranks)
    theirs = PublishedBench(bench_config(config, amp="off" if config.dry_run else "fp16", compile=False), ranks)
    runs = in_turn({"ours": ours.together, "published": theirs.together}, config)
    memory = {name: memory_gb(of) for name, of in runs.items()}
    split = [ours.apart() for _ in range(3)]
    return {
        "ours": summary(ours, runs["ours"]) | {"memory_gb": memory["ours"]},
        "published": summary(theirs, runs["published"]) | {"memory_gb": memory["published"]},
        "ours_over_published": ratio(runs["ours"], runs["published"]),
        "our_stages_ms": {stage: interval([one[stage] for one in split]) for stage in split[0]},
    }


# ---- real images ----


def use_cores(cores: int, all_cores: list[int]) -> None:
    """Every thread of this process, PyTorch's as well, on the first `cores` of them; new ones inherit it."""
    torch.set_num_threads(cores)  # more of OpenMP's threads than cores wait for each other in loops
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), all_cores[:cores])


def measure_loader(config: StageConfig, ranks: Ranks, name: str) -> dict:
    """Real and synthetic images in turn, by number of cores that the whole process has."""
    all_cores = sorted(os.sched_getaffinity(0))
    published = name == "torch"
    kind = PublishedBench if published else Bench
    flags = {"amp": "off" if config.dry_run else "fp16", "compile": False} if published else {}
    bench, found = kind(bench_config(config, **flags), ranks), {}
    bench.together()  # compiled with all cores
    counts = [n for n in CORES.get(name, (len(all_cores),)) if n <= len(all_cores)]
    for cores in [1] if config.dry_run else counts:
        use_cores(cores, all_cores)
        card = replace(PRESETS["imagenet"], **{f: getattr(bench.config, f) for f in ("resolution", "global_batch")})
        card = replace(card, data=config.data, loader=name, workers=cores)
        loader = make_loader(loader_config(card, ranks))
        real, synthetic = bench.batches_of(loader), bench.batches_of(None)
        turns = {"synthetic": lambda s=synthetic: bench.together(s), "real": lambda r=real: bench.together(r)}
        runs = in_turn(turns, config)
        real.close()
        loader.close()
        memory = memory_gb(runs["real"]), memory_gb(runs["synthetic"])
        found[str(cores)] = {
            "real_over_synthetic": ratio(runs["real"], runs["synthetic"]),
            "real": summary(bench, runs["real"]) | {"memory_gb": memory[0]},
            "synthetic": summary(bench, runs["synthetic"]),
        }
    use_cores(1 if config.dry_run else len(all_cores), all_cores)
    return {"by_cores": found}


def measure_cifar(config: StageConfig, ranks: Ranks) -> dict:
    """Seconds of an epoch of CIFAR-10 by what makes its small steps faster."""
    ways = {"plain": {}, "compile": {"compile": True}}
    if ranks.device.type == "cuda":
        ways |= {"cuda_graph": {"cuda_graph": True}, "compile_cuda_graph": {"compile": True, "cuda_graph": True}}
    benches, turns = {}, {}
    for name, flags in ways.items():
        flags = {"compile": False, "cuda_graph": False} | ({} if config.dry_run else flags)
        card = bench_config(config, cifar=True, data=config.cifar, loader="resident", **flags)
        benches[name] = Bench(card, ranks)
        turns[name] = benches[name].together
    runs = in_turn(turns, config)
    found = {}
    for name, bench in benches.items():
        memory = memory_gb(runs[name])
        found[name] = summary(bench, runs[name]) | {"memory_gb": memory}
        found[name]["epoch_s"] = round(bench.loader.steps_per_epoch * found[name]["step_ms"]["mean"] / 1000, 3)
        bench.close()
    fastest = min(found, key=lambda name: found[name]["epoch_s"])
    return {"by_way": found, "fastest": fastest, "flags": ["--compile"] * ("compile" in fastest)
            + ["--cuda-graph"] * ("cuda_graph" in fastest)}  # fmt: skip


def main(config: StageConfig) -> None:
    if not (torch.cuda.is_available() or config.dry_run):
        raise UserError("there is no GPU here; --dry-run walks through at toy size on the CPU")
    ranks = start_ranks()
    measure = {"kernels": measure_kernels, "step": measure_step, "cifar10-speed": measure_cifar}
    measure |= {f"loader-{name}": partial(measure_loader, name=name) for name in LOADERS}
    for stage in config.stages:
        found = measure[stage](config, ranks) | {"device": device_name(ranks), "torch": torch.__version__}
        write_whole(config.out / f"{stage}.json", json.dumps(found | {"dry_run": config.dry_run}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(StageConfig, main)
