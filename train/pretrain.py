"""Pretrains an encoder with Barlow Twins, or one of its rivals, and leaves it in a run folder.

    torchrun train/pretrain.py                              one process; the published recipe on data/imagenet
    torchrun --nproc-per-node=8 train/pretrain.py           eight GPUs, the same update
    python train/pretrain.py --preset cifar10 --help        another experiment card, and its values
    python train/pretrain.py --preset cifar10-byol          another method; imagenet-simclr, …-simsiam, …-vicreg

Started again, the same command goes on where the run stopped, to the step. SIGTERM and SIGUSR1 write a checkpoint
at the next step and end with exit code 75 (run me again), Ctrl-C likewise with 130; a second Ctrl-C ends at once.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.command import run_command
from pipeline.loader import make_loader
from pipeline.one_writer import OneWriter
from pipeline.storage.shards import open_stored
from train.agreement import only_writer, require_same_start
from train.batchnorm import with_global_batch_norm
from train.cards import chosen_preset, resolved
from train.checkpoint import export_backbone
from train.config import AMP, PretrainConfig, as_plain
from train.distributed import Ranks, StopRequest, say, start_ranks, stop_ranks
from train.guard import UpdateGuard
from train.initial import initial_network, start_heads_
from train.lars import LARS, gradient_norm
from train.memory import apply_activations, compile_parts, with_activations, with_device_defaults
from train.methods.choose import make_method
from train.online_knn import OnlineKnn
from train.plots import plot_loss
from train.recompute import run_in_parts
from train.recorded import RecordedStep, require_one_gpu
from train.run_data import dataset_sha256, loader_config, train_beton
from train.runlog import RunLog, describe_run, open_run_folder
from train.runstate import RunState
from train.schedule import lr_share
from train.together import keep_views_apart
from train.watchdog import Watchdog

EXIT_FINISHED, EXIT_REQUEUE, EXIT_INTERRUPTED = 0, 75, 130  # 75 is sysexits' EX_TEMPFAIL: worth another try


def main(config: PretrainConfig) -> None:
    config = resolved(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    ranks = start_ranks(2 * config.timeout_minutes)  # the watchdog speaks first
    try:
        images = dataset_sha256(open_stored(train_beton(config.data)))
        require_same_start(ranks, config, images)
        loader = make_loader(loader_config(config, ranks))
        try:
            code = train(config, ranks, loader, images)
        finally:
            loader.close()
    finally:
        stop_ranks()
    sys.exit(code)


def train(config: PretrainConfig, ranks: Ranks, loader, images_sha256: str = "") -> int:
    """Trains from wherever the run stands to its end, or to a signal; returns the exit code.

    `images_sha256` is the digest of the loader's dataset, "" where there is none to compare.
    """
    folder, config = Path(config.run), with_device_defaults(config, ranks)
    if config.cuda_graph:
        require_one_gpu(ranks)
    open_run_folder(folder)
    with only_writer(folder, ranks, "the run") as writer:
        return train_alone(config, ranks, loader, images_sha256, writer)


def train_alone(config: PretrainConfig, ranks: Ranks, loader, images_sha256: str, writer: OneWriter | None) -> int:
    """`train`, where no other process writes the run's folder meanwhile; rank 0 has the `writer`."""
    folder = Path(config.run)
    torch.manual_seed(config.seed)
    backbone, features, theirs = initial_network(config)
    method = make_method(backbone, features, config)
    if config.init_from:
        heads = "backbone and heads" if start_heads_(method, theirs) else "the backbone alone"
        say(ranks, f"{folder}: a new run begins with {heads} of {config.init_from}")
    del theirs  # hundreds of MB
    method = method.to(ranks.device, memory_format=torch.channels_last)
    method = with_global_batch_norm(method)
    config = with_activations(config, method, ranks)
    if config.views_together:
        keep_views_apart(method)
    apply_activations(config, method)
    if config.accumulate > 1:
        run_in_parts(method.backbone, config.accumulate)
    optimizer = LARS(method.parameter_groups(), eta=config.lars_eta, clip=config.lars_clip)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")

    # These three, the step and the seed are the whole state: order and views are functions of seed and step.
    parts = {"model": method, "optimizer": optimizer, "scaler": scaler}
    state = RunState(config, ranks, parts, features, loader, dataset_sha256=images_sha256, writer=writer)
    start_step = state.resume()
    stop_step = config.epochs * loader.steps_per_epoch
    if start_step == 0:  # also shows now, not after an epoch, whether the disk takes a checkpoint
        state.save(0)
        state.finish()
    if ranks.rank == 0:
        describe_run(folder, as_plain(config), ranks, start_step)
    where = f"{ranks.world_size} × {ranks.device.type}"
    where += ", compiled: the first step takes a minute or more" if config.compile else ""
    where += ", then replayed as one CUDA graph" if config.cuda_graph else ""
    say(ranks, f"{folder}: steps {start_step} to {stop_step} of {config.global_batch} images on {where}")

    if config.compile:
        compile_parts(config, method)
    torch.backends.cudnn.benchmark = not config.deterministic
    model = method
    if ranks.world_size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        model = DistributedDataParallel(method, device_ids=devices, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # batch norm's are equal on all ranks

    def gradients(views: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        with torch.autocast(ranks.device.type, AMP[config.amp], enabled=config.amp != "off"):
            loss, metrics = model(views)
        scaler.scale(loss).backward()
        metrics["gradient_norm"] = gradient_norm(optimizer) / scaler.scale(torch.ones_like(metrics["loss"]))
        return metrics

    recorded = RecordedStep(gradients, optimizer) if config.cuda_graph else None
    warmup_steps = config.warmup_epochs * loader.steps_per_epoch
    guard = UpdateGuard(method, config, ranks, loader.ids)
    knn = OnlineKnn(config, ranks, method.backbone, loader.steps_per_epoch)
    log = RunLog(config, ranks, start_step, stop_step, loader.steps_per_epoch, loader.ids)
    watchdog = Watchdog(ranks, config.timeout_minutes)
    with StopRequest(ranks) as stop, contextlib.closing(log), watchdog, state, knn:
        batches = iter(loader.batches(start_step, stop_step))
        for step in range(start_step, stop_step):
            asked = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - asked
            watchdog.step(step)
            guard.before_step()

            share = lr_share(step, warmup_steps, stop_step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1.0 if group.get("constant_lr") else share)
            torch.manual_seed(hash((config.seed, step, ranks.rank)))  # for networks with dropout: resumed, the same
            if recorded:
                metrics, kept = recorded(batch.views), True
            else:
                metrics = gradients(batch.views)
                if kept := guard.keeps(metrics["loss"], step):
                    scaler.step(optimizer)  # with fp16 the one host sync of a step: were the gradients finite?
                    scaler.update()
                optimizer.zero_grad(set_to_none=True)
            if kept:
                method.after_step(step, stop_step)
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            log.record(step, metrics, rates, waited_s, kept, batch.substituted)

            knn.report(log)
            if knn.due(step + 1, stop_step):
                knn.begin(step + 1, log)
            stopping = stop.agreed(state.failed)  # a signal, or a checkpoint that could not be written
            if stopping or state.due(step + 1):
                log.before_checkpoint()  # a loss that is no number ends the run, its checkpoint stays good
                log.pictures(step + 1, batch.views, method)
                state.save(step + 1)
            if stopping or step + 1 == stop_step:
                state.finish()
            if stopping and step + 1 < stop_step:
                say(ranks, f"stopped after step {step + 1}; the same command goes on from there")
                return EXIT_INTERRUPTED if stopping == signal.SIGINT else EXIT_REQUEUE
        knn.report(log, wait=True)

    if ranks.rank == 0:
        export_backbone(folder, method.backbone, state.info(stop_step))
        plot_loss(folder)
    return EXIT_FINISHED


if __name__ == "__main__":
    run_command(PretrainConfig, main, chosen_preset(sys.argv))
