"""Pretrains an encoder with Barlow Twins or another method, and leaves it in a run folder.

    torchrun train/pretrain.py                              one process; the published recipe on data/imagenet
    torchrun --nproc-per-node=8 train/pretrain.py           eight GPUs, the same update
    python train/pretrain.py --preset cifar10 --help        another experiment card, and its values
    python train/pretrain.py --preset cifar10-byol          another method; imagenet-simclr, …-moco_v2, …-swav

Started again, the same command continues where the run stopped, to the step. SIGTERM, SIGUSR1 and SIGUSR2 write a
checkpoint at the next step and end with exit code 75 (run me again), Ctrl-C likewise with 130; a second Ctrl-C ends at
once, and so does each of them before the first step.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds, in which a batch system may send a signal
    from pipeline.stopping import end_at_signals

    end_at_signals()

import torch

from pipeline.command import run_command, shown
from pipeline.loader import Loader, make_loader
from pipeline.one_writer import OneWriter
from pipeline.stopping import exit_code
from pipeline.storage.shards import open_stored
from train.agreement import only_writer, require_same_start
from train.checkpoint import export_backbone, longer_text
from train.config import PretrainConfig, as_plain
from train.cpu_cost import say_cost
from train.curves import plot_loss
from train.distributed import Ranks, StopRequest, joined_ranks, largest, say
from train.ending import end_text, finished, next_text
from train.flags import chosen_preset, resolved
from train.memory import with_device_defaults
from train.online_knn import OnlineKnn, classes_beside
from train.run_data import dataset_sha256, loader_config, refuse_long_queue, train_beton
from train.runlog import METRICS, RunLog, describe_run, open_run_folder
from train.runstate import RunState
from train.update import make_update
from train.watchdog import Watchdog

EXIT_FINISHED = 0


def main(config: PretrainConfig) -> None:
    """Trains on every rank that torchrun started, and ends the process with the exit code."""
    config = resolved(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with joined_ranks(2 * config.timeout_minutes) as ranks:  # the watchdog speaks first
        images = dataset_sha256(open_stored(train_beton(config.data)))
        require_same_start(ranks, config, images)
        if largest(ranks, int(ranks.rank == 0 and finished(config, images))):
            folder = Path(config.run)
            longer = f"; {longer_text(folder)}" if config.epochs else ""  # an untrained control is no beginning
            say(ranks, f"{shown(folder)} is finished already, nothing was done{longer}")
            say(ranks, next_text(config))
            sys.exit(EXIT_FINISHED)
        loader = make_loader(loader_config(config, ranks))
        try:
            code = train(config, ranks, loader, images_sha256=images)
            if code == EXIT_FINISHED:
                say(ranks, next_text(config))
        finally:
            loader.close()
    sys.exit(code)


def train(config: PretrainConfig, ranks: Ranks, loader: Loader, *, images_sha256: str = "") -> int:
    """Trains from wherever the run stands to its end, or to a signal; returns the exit code.

    `images_sha256` is the digest of the loader's dataset, "" where there is none to compare.
    """
    config = with_device_defaults(config, ranks)  # what cannot run here is refused before there is a folder
    refuse_long_queue(config, len(loader.ids))
    folder = Path(config.run)
    open_run_folder(folder)
    with only_writer(folder, ranks, "the run") as writer:
        return train_alone(config, ranks, loader, images_sha256=images_sha256, writer=writer)


def train_alone(
    config: PretrainConfig, ranks: Ranks, loader: Loader, *, images_sha256: str, writer: OneWriter | None
) -> int:
    """`train`, where no other process writes the run's folder meanwhile; rank 0 has the `writer`."""
    classes = classes_beside(config)
    update = make_update(config, ranks, steps_per_epoch=loader.steps_per_epoch, ids=loader.ids, classes=classes)
    folder, config, stop_step = Path(config.run), update.config, update.stop_step
    say_cost(update)
    state = RunState(update, loader.images, dataset_sha256=images_sha256, writer=writer)
    start_step = state.resume()
    if start_step == 0:
        state.begin()
    if stop_step == 0:  # --epochs 0: no step will lead to it
        state.save(0)
        state.finish()
    if ranks.rank == 0:
        describe_run(folder, as_plain(config), ranks, start_step=start_step)
    where = f"{ranks.world_size} × {ranks.device.type}"
    where += ", compiled: the first step takes a minute or more" if config.compile else ""
    where += ", then replayed as one CUDA graph" if config.cuda_graph else ""
    say(ranks, f"{shown(folder)}: steps {start_step} to {stop_step} of {config.global_batch} images on {where}")

    knn = OnlineKnn(update)
    log = RunLog(update, ids=loader.ids, start_step=start_step)
    watchdog = Watchdog(ranks, config.timeout_minutes)
    begun_s = time.monotonic()
    with StopRequest(ranks) as stop, contextlib.closing(log), watchdog, state, knn:
        batches = loader.batches(start_step, stop_step)
        for step in range(start_step, stop_step):
            asked = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - asked
            watchdog.step(step)
            metrics = update(batch.views, step, batch.label)
            log.record(step, metrics, update.rates, waited_s=waited_s, substituted=batch.substituted)

            knn.report(log)
            if knn.due(step + 1):
                knn.begin(step + 1, log)
            stopping = stop.agreed(state.failed)  # a signal, or a checkpoint that could not be written
            if stopping or state.due(step + 1):
                log.before_checkpoint()  # a loss that is not finite ends the run; its last checkpoint stays good
                log.pictures(step + 1, batch.views, update.method)
                state.save(step + 1)
            if stopping or step + 1 == stop_step:
                state.finish()
            if stopping and step + 1 < stop_step:
                say(ranks, f"stopped after step {step + 1}; the same command continues from there")
                return exit_code(stopping)
        knn.report(log, wait=True)

    if ranks.rank == 0:
        export_backbone(folder, update.method.backbone, state.info(stop_step))
        plot_loss(folder / METRICS)
    steps, seconds = stop_step - start_step, time.monotonic() - begun_s
    say(ranks, end_text(folder, steps=steps, images=steps * config.global_batch, seconds=seconds))
    return EXIT_FINISHED


if __name__ == "__main__":
    run_command(PretrainConfig, main, chosen_preset(sys.argv))
