"""Training steps on a GPU: ours beside the published way, CIFAR-10's ways of stepping, real images beside synthetic.

    step         ResNet-50 on synthetic images at batch 512, ours and the published way in turn; ours on real images and
                 on synthetic ones in turn, with the same cores; ours at batch 1024
    ways         the step of --preset cifar10 on resident images, the ways of stepping in turn
    loader-dali  real ÷ synthetic where DALI decodes

The published way (facebookresearch/barlowtwins): fp16 autocast with a loss scaler, NCHW, not compiled, every activation
kept, LARS as a loop over parameters. At 1024 images it needs more than 80 GB, so the two are compared at 512. Between
turns each keeps only its weights and momentum in GPU memory. Ratios are of turns of one process.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_record import Record, StageConfig
from measure import GB, Interval, in_turn, interval
from step import SYNTHETIC, Bench, BenchConfig

from pipeline.errors import UserError
from pipeline.loader import Loader, make_loader
from pipeline.storage.beton import open_beton
from train.cards import PRESETS
from train.config import PretrainConfig
from train.distributed import Ranks, start_ranks
from train.flags import resolved
from train.methods.contract import Metrics
from train.run_data import loader_config
from train.update import Update, Views, make_update

PARTS = ("compile", "graph", "together")
WAYS = ("compile+graph", "compile+graph+together", "graph", "graph+together", "compile", "eager")
EQUAL_BATCH, BATCH = 512, 1024
CORES = (4, 2)
ROUNDS = 5

Run = dict[str, float]


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


class PublishedUpdate(Update):
    """The published way's step: views and weights in NCHW, and no norm of the gradient for a record."""

    def gradients(self, views: tuple[torch.Tensor, ...]) -> Metrics:
        loss, metrics = self.forward(tuple(view.contiguous() for view in views))
        self.scaler.scale(loss).backward()
        return metrics


def make_published_update(config: PretrainConfig, ranks: Ranks) -> PublishedUpdate:
    """`config` says the rest of that way: see `published`."""
    ours = make_update(config, ranks)
    method = ours.method.to(memory_format=torch.contiguous_format)
    return PublishedUpdate(**vars(ours) | {"optimizer": LoopLARS(method.parameter_groups())})


# ---- what is run ----


def way_fields(way: str) -> dict[str, Any]:
    """The fields of PretrainConfig that a way such as compile+graph means; eager is none of the parts."""
    parts = [part for part in way.split("+") if part != "eager"]
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--way {way} has the part {unknown[0]!r}; give eager, or join some of {', '.join(PARTS)} by +")
    return {"compile": "compile" in parts, "cuda_graph": "graph" in parts, "views_together": "together" in parts}


def ours(activations: str = "all") -> dict[str, Any]:
    """How this project steps ResNet-50 on one GPU: compiled. Only on a quiet machine may auto look at what is free."""
    return way_fields("compile") | {"activations": activations}


def published(dry_run: bool) -> dict[str, Any]:
    """The published step's fields, as far as they are fields; PublishedUpdate is the rest."""
    amp = {"amp": "off" if dry_run else "fp16"}
    return way_fields("eager") | amp | {"activations": "all"}


def bench_card(config: StageConfig, preset: str, batch: int, chosen: dict) -> BenchConfig:
    """The card of a measurement on synthetic images, at its real or at toy size."""
    card = asdict(PRESETS[preset]) | {"global_batch": batch, "steps": 20 if preset == "cifar10" else 10} | chosen
    if config.dry_run:
        card |= {"arch": "test_resnet", "stem": "imagenet", "projector": "16-16", "resolution": 32, "global_batch": 4}
        card |= {"steps": 1, "compile": False, "cuda_graph": False, "workers": 1, "amp": "off"}
    return replace(resolved(BenchConfig(**card | {"data": SYNTHETIC})), data=SYNTHETIC)


def rounds_of(turns: Mapping[str, Callable[[], Run]], rounds: int) -> Iterator[dict[str, list[Run]]]:
    """All turns one after the other, again and again, each with its memory: what there is after each round."""
    return in_turn({name: partial(with_memory, run) for name, run in turns.items()}, rounds)


def with_memory(run: Callable[[], Run]) -> Run:
    """A turn and, on a GPU, the most memory it had, GB; what earlier turns left unused goes back first."""
    if not torch.cuda.is_available():
        return run()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run() | {"memory_gb": torch.cuda.max_memory_allocated() / GB}


def summary(bench: Bench, runs: list[Run]) -> dict:
    """Of some turns: speed, memory, the wait for data, the share of the GPU's bf16 peak."""
    step_ms = interval([run["step"] for run in runs])
    return {
        "batch": bench.config.global_batch,
        "activations": bench.config.activations,
        "images_per_s": interval([1000 * bench.config.global_batch / run["step"] for run in runs]),
        "step_ms": step_ms,
        "data_wait_share": interval([run["data_wait"] / run["step"] for run in runs]),
        "mfu": bench.mfu(step_ms["mean"]),
        "memory_gb": round(max(run["memory_gb"] for run in runs), 2) if bench.cuda else None,
    }


def ratio(of: list[Run], to: list[Run]) -> Interval:
    """Speed of one ÷ that of the other, turn by turn."""
    return interval([other["step"] / one["step"] for one, other in zip(of, to, strict=True)])


# ---- the stages ----


def measure_step(config: StageConfig, record: Record) -> None:
    """Ours and the published way; then ours on real images; then ours at the card's own batch."""
    ranks, rounds = start_ranks(), 2 if config.dry_run else ROUNDS
    one = Bench(bench_card(config, "imagenet", EQUAL_BATCH, ours()), ranks)
    other = Bench(bench_card(config, "imagenet", EQUAL_BATCH, published(config.dry_run)), ranks, make_published_update)
    turns = {"ours": one.together, "published": other.together}
    for turn in turns.values():  # compiled, and cuDNN's kernels chosen
        with_memory(turn)
    record.wait_until_quiet()
    for runs in rounds_of(turns, rounds):
        record.write(
            rounds=len(runs["ours"]),
            ours=summary(one, runs["ours"]),
            published=summary(other, runs["published"]),
            ours_over_published=ratio(runs["ours"], runs["published"]),
        )
    del other, turns, turn  # its memory is not to count in what follows
    measure_real(config, record, "fast", one, ranks)
    del one
    full = Bench(bench_card(config, "imagenet", BATCH, ours("auto")), ranks)
    for runs in rounds_of({"full": full.together}, rounds):
        record.write(ours_full=summary(full, runs["full"]))
    record.write(complete=True)


def measure_ways(config: StageConfig, record: Record) -> None:
    """A way that fails is recorded with its reason; the others are measured."""
    ranks = start_ranks()
    card = replace(bench_card(config, "cifar10", 256, {}), data=config.cifar, loader="resident")
    loader = make_loader(loader_config(card, ranks))
    benches: dict[str, Bench] = {}
    turns: dict[str, Generator[Views, None, None]] = {}
    runs: dict[str, list[Run]] = {}
    found: dict[str, dict[str, Any]] = {}

    def run(way: str) -> None:
        try:
            if way not in benches:
                benches[way] = Bench(bench_card(config, "cifar10", 256, way_fields(way)), ranks)
                turns[way] = benches[way].batches_of(loader)
                benches[way].together(turns[way])
            runs.setdefault(way, []).append(with_memory(partial(benches[way].together, turns[way])))
        except Exception as error:
            traceback.print_exc()
            found[way] = {"error": f"{type(error).__name__}: {error}"[:300]}
            return
        found[way] = summary(benches[way], runs[way])
        found[way]["epoch_s"] = round(loader.steps_per_epoch * found[way]["step_ms"]["mean"] / 1000, 3)
        measured = [name for name, of in found.items() if "error" not in of]
        record.write(by_way=found, fastest=min(measured, key=lambda name: found[name]["epoch_s"]))

    for done in range(2 if config.dry_run else ROUNDS):
        for way in WAYS:
            if "error" not in found.get(way, {}):
                run(way)
        record.write(rounds=done + 1, by_way=found)
    for batches in turns.values():
        batches.close()
    loader.close()
    if not runs:
        raise UserError(f"no way of stepping could be run; the first one ended with {found[WAYS[0]]['error']}")
    record.write(complete=True)


def use_cores(cores: int, all_cores: list[int]) -> None:
    """Every thread of this process, PyTorch's as well, on the first `cores` of them; new ones inherit it."""
    torch.set_num_threads(cores)  # more of OpenMP's threads than cores wait for each other in loops
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), all_cores[:cores])


def measure_dali(config: StageConfig, record: Record) -> None:
    """Real images that DALI decodes; one that it cannot decode shows before minutes go into compiling."""
    ranks = start_ranks()
    card = bench_card(config, "imagenet", EQUAL_BATCH, ours())
    with contextlib.closing(real_loader(config, card, "dali", CORES[0], ranks)) as loader:
        for _ in loader.batches(0, 1):
            pass
    bench = Bench(card, ranks)
    bench.together()  # compiled with all cores
    measure_real(config, record, "dali", bench, ranks)
    record.write(complete=True)


def real_loader(config: StageConfig, card: BenchConfig, name: str, cores: int, ranks: Ranks) -> Loader:
    real = loader_config(replace(card, data=config.data, loader=name, workers=cores), ranks)
    return make_loader(replace(real, ids=repeated(real.data, 4 * card.global_batch)))


def measure_real(config: StageConfig, record: Record, name: str, bench: Bench, ranks: Ranks) -> None:
    """Real images and synthetic ones in turn, by number of cores that the whole process has."""
    all_cores, found = sorted(os.sched_getaffinity(0)), {}
    for cores in [1] if config.dry_run else [n for n in CORES if n <= len(all_cores)]:
        use_cores(cores, all_cores)
        loader = real_loader(config, bench.config, name, cores, ranks)
        real, synthetic = bench.batches_of(loader), bench.batches_of(None)
        turns = {"synthetic": partial(bench.together, synthetic), "real": partial(bench.together, real)}
        for runs in rounds_of(turns, 2 if config.dry_run else ROUNDS):
            found[str(cores)] = {
                "real_over_synthetic": ratio(runs["real"], runs["synthetic"]),
                "real": summary(bench, runs["real"]),
                "synthetic": summary(bench, runs["synthetic"]),
            }
            record.write(rounds=len(runs["real"]), by_cores=found)
        real.close()
        loader.close()
        use_cores(len(all_cores), all_cores)


def repeated(data: Path, least: int) -> np.ndarray:
    """Ids of all images of a .beton, again and again until there are `least`: an epoch needs full batches."""
    images = len(open_beton(data))
    return np.arange(max(images, least)) % images
