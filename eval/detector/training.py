"""A detector on its way through a schedule: train, compute batch norm's statistics again, detect.

The state is the model, the optimizer and the number of iterations done. Order, flips, sizes and sampled regions are
functions of the seed, the iteration and the rank, so an interrupted training ends with the weights of one that
was not (bit for bit on a CPU).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.data
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from eval.detector.data import DetectionImages, Split
from eval.protocols import DETECTION, OLDER_SETTINGS
from pipeline.choices.order import shuffled_batches
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.progress import progress
from pipeline.spec import is_whole
from train.content import DamagedFile, is_plain, read_state, write_state
from train.distributed import Ranks, StopRequest, averaging_gradients
from train.resuming import load_part_

FORMAT, VERSION = "barlow-at-speed detection", 1
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # of all but batch norm's weights, which have no decay
LOG_EVERY = 20


@dataclass(frozen=True)
class Schedule:
    """Iterations of `batch` images over all ranks; a tenth of the learning rate after each of the `steps`.

    The rate rises linearly over `warmup` iterations, from the share `warmup_from` of it (Detectron2's WARMUP_FACTOR).
    """

    iterations: int
    batch: int
    lr: float
    warmup: int
    warmup_from: float
    steps: tuple[int, ...]
    precise_bn: int
    seed: int

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        rate = self.lr * 0.1 ** sum(iteration >= step for step in self.steps)
        done = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        return rate * (self.warmup_from * (1 - done) + done)


def make_optimizer(detector: nn.Module) -> torch.optim.SGD:
    """SGD whose weight decay leaves batch norm's weights out; `Schedule.rate` sets its learning rate."""
    norms = [p for m in detector.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    known = set(map(id, norms))
    others = [p for p in detector.parameters() if id(p) not in known]
    groups = [{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)


def decoded(images: DetectionImages, keys: Iterable[list], workers: int) -> Iterator[tuple[list, list]]:
    """Batches of (images, targets). Raises UserError for an image that cannot be used."""
    loader = torch.utils.data.DataLoader(images, batch_sampler=list(keys), num_workers=workers, collate_fn=list)
    for samples in loader:
        for sample in samples:
            if isinstance(sample, UserError):
                raise sample
        yield [image for image, _ in samples], [target for _, target in samples]


def moved(images: list, targets: list, device: torch.device) -> tuple[list, list]:
    """The same on a device."""
    return (
        [image.to(device, non_blocking=True) for image in images],
        [{name: tensor.to(device, non_blocking=True) for name, tensor in target.items()} for target in targets],
    )


@dataclass
class Training:
    """A detector and its optimizer after `iteration` updates.

    path     of its checkpoint
    about    what a checkpoint must share with its run
    writer   rank 0's right to write the checkpoint; without one nobody else is expected to
    """

    detector: nn.Module
    schedule: Schedule
    ranks: Ranks
    workers: int
    path: Path
    about: dict
    writer: OneWriter | None = None
    iteration: int = 0

    def __post_init__(self):
        self.optimizer = make_optimizer(self.detector)

    def save(self) -> None:
        """Writes the checkpoint, on rank 0, whole or not at all."""
        if self.ranks.rank == 0:
            if self.writer:
                self.writer.require()
            state = {"format": FORMAT, "version": VERSION, "about": self.about, "iteration": self.iteration}
            state |= {"model": self.detector.state_dict(), "optimizer": self.optimizer.state_dict()}
            write_state(self.path, state)

    def resume(self) -> None:
        """Continues from the checkpoint, where there is one. Raises UserError for another run's, or a damaged one."""
        if not self.path.is_file():
            return
        try:
            state, _ = read_state(self.path)
        except DamagedFile as error:
            raise UserError(f"{error}; delete it to start over") from None
        state = state if isinstance(state, dict) else {}
        kind = [state.get("format"), state.get("version")]
        about = state.get("about") if is_plain(kind) and kind == [FORMAT, VERSION] else None
        older = OLDER_SETTINGS[DETECTION[self.about["task"]].name]  # what older checkpoints do not say
        found = older | about if isinstance(about, dict) and is_plain(about) else {}
        if found != self.about:
            other = [str(name) for name in self.about | found if found.get(name) != self.about.get(name)]
            raise UserError(
                f"{self.path} belongs to an evaluation with another {', '.join(other)}; make the flags equal, "
                "or delete it to start over"
            )
        for name, part in (("model", self.detector), ("optimizer", self.optimizer)):
            load_part_(part, state.get(name), name, self.path, "delete it to start over")
        done: Any = state.get("iteration")
        if not is_whole(done, 0) or done > self.schedule.iterations:
            text = f"{self.path} is of no iteration up to {self.schedule.iterations}; delete it to start over"
            raise UserError(text)
        self.iteration = done

    def samples(self, images: DetectionImages, start: int, stop: int) -> Iterator[tuple[list, list]]:
        """This rank's (images, targets) of iterations start … stop − 1, and torch's seed set for each."""
        schedule, ranks = self.schedule, self.ranks
        positions = np.arange(len(images.records))
        shares = (positions, schedule.batch, ranks.rank, ranks.world_size, start, stop)
        keys = ([(epoch, int(p)) for p in own] for _, epoch, own in shuffled_batches(schedule.seed, *shares))
        for iteration, batch in enumerate(decoded(images, keys, self.workers), start):
            torch.manual_seed(hash((schedule.seed, iteration, ranks.rank)))  # sizes, sampled anchors and regions
            yield moved(*batch, ranks.device)


def train(training: Training, images: DetectionImages, checkpoint_every: int) -> int:
    """Trains to the end of the schedule or to a signal, which it returns; 0 at the end."""
    ranks, schedule, optimizer = training.ranks, training.schedule, training.optimizer
    model = averaging_gradients(training.detector.train(), ranks)
    start, stop = training.iteration, schedule.iterations
    bar = progress(None, "training", stop, unit="iteration", done=start)
    with StopRequest(ranks) as request, bar:
        for samples in training.samples(images, start, stop):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(training.iteration)
            losses = model(*samples)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()
            training.iteration += 1
            bar.update()
            asked = request.agreed()
            due = training.iteration % checkpoint_every == 0 or training.iteration == stop or asked
            if due or training.iteration % LOG_EVERY == 0:
                refuse_lost_loss(losses, training.iteration)
                bar.set_postfix_str(", ".join(f"{n.removeprefix('loss_')} {v.item():.3f}" for n, v in losses.items()))
            if due:
                training.save()
            if asked and training.iteration < stop:
                return asked
    return 0


def refuse_lost_loss(losses: dict[str, torch.Tensor], iteration: int) -> None:
    """Raises UserError where a loss is not finite: such weights are not written."""
    lost = [name for name, value in losses.items() if not math.isfinite(value.item())]
    if lost:
        raise UserError(
            f"{lost[0]} is {losses[lost[0]].item()} in iteration {iteration}, a finite number was expected; "
            "lower --lr or lengthen --warmup; the last checkpoint is from before"
        )


@torch.no_grad()
def take_precise_statistics(training: Training, images: DetectionImages) -> None:
    """Computes batch norm's running statistics again: plain means over the next batches (Wu 2021, section 3)."""
    norms = [m for m in training.detector.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training.detector.train()
    start = training.schedule.iterations
    for i, samples in enumerate(training.samples(images, start, start + training.schedule.precise_bn), 1):
        for norm in norms:
            norm.momentum = 1 / i
        training.detector(*samples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def detect(training: Training, split: Split, masks: bool) -> list[dict]:
    """All ranks' detections of a split, in COCO's results form, on every rank, in the order of image ids."""
    ranks, detector = training.ranks, training.detector.eval()
    images = DetectionImages(split.records, masks=False, keep_ignored=True, seed=0)
    positions = range(ranks.rank, len(split), ranks.world_size)
    samples = decoded(images, [[(-1, position)] for position in positions], training.workers)
    found = []
    for position, (image, _) in zip(progress(positions, "test", len(positions), unit="image"), samples, strict=True):
        (output,) = detector([image[0].to(ranks.device)])
        found += as_results(output, split.records[position].image_id, masks)
    parts: list = [found]
    if ranks.world_size > 1:
        parts = [None] * ranks.world_size
        dist.all_gather_object(parts, found, group=ranks.control)
    return sorted((d for part in parts for d in part), key=lambda d: d["image_id"])


def as_results(output: dict[str, torch.Tensor], image_id: int, masks: bool) -> list[dict]:
    """One image's detections by torchvision's detector, x1 y1 x2 y2, in COCO's results form."""
    results = []
    boxes = output["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    for box, score, label in zip(boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True):
        results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    if masks:
        from pycocotools import mask

        for result, probability in zip(results, output["masks"], strict=True):
            runs = mask.encode(np.asfortranarray((probability[0] > 0.5).cpu().numpy().astype(np.uint8)))
            result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return results
