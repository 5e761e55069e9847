"""The accuracies of the network in training, every --knn-every epochs, beside the steps: the nearest neighbours' vote,
and the linear layer that is trained beside it (online_linear.py).

    training     ── step ── copy of the weights ── step ── step ── step ── step ── step ──
    a thread                         └─ features of those that vote ─ of those asked ─ vote ─┘ a line in metrics.jsonl

Rank 0 does it, with a copy of the backbone in evaluation mode: weights, batch norm's statistics and random numbers of
the training are not touched, and no other rank takes part. On a GPU it runs on a stream of its own. A step waits for it
only when the next one is due before this one is done, and so does the end of the run; a run that is stopped does not.

    cost     2 × --knn-images centre views, decoded by one thread, through the backbone without gradients: 10,000 images
             of CIFAR-10 are a fifth of an epoch's images, without views and backward pass. The steps that run meanwhile
             are slower by as much work as that. Memory: the backbone once more, and 128 images without gradients.

Protocol of eval/knn.py (centre views, cosine, weighted votes of the 20 nearest), but with fewer images and in the
training's autocast: a curve to look at, not a result.
"""

import copy
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipeline.choices.subsets import balanced_subset
from pipeline.errors import UserError
from pipeline.loader import Loader, make_loader
from pipeline.spec import LoaderConfig, centre_view
from pipeline.storage.beton import require_same_classes
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.shards import open_stored
from train.config import AMP, NORMALIZATIONS, PretrainConfig
from train.distributed import say
from train.knn_vote import KNN_HEADLINE, knn_ranks, label_ranks
from train.run_data import train_beton
from train.runlog import RunLog
from train.update import Update

BATCH = 128
MOST_THAT_VOTE = 0.8  # of the training images, where the others are to be asked


def labelled_file(data: Path) -> Path | None:
    """The training file; if it has no labels, train.beton beside it, as STL-10 has it; None if that has none either."""
    path = train_beton(data)
    beside = path.with_name("train" + (SHARDS if path.name.endswith(SHARDS) else ".beton"))
    return next((p for p in (path, beside) if p.is_file() and open_stored(p).labelled), None)


def held_out(path: Path) -> Path:
    """The validation file beside a training file, which may be missing."""
    return path.with_name("val" + (SHARDS if path.name.endswith(SHARDS) else ".beton"))


def classes_beside(config: PretrainConfig) -> int:
    """How many classes the linear layer beside a run tells apart; 0 for none: it learns from the run's own labels."""
    stored = open_stored(train_beton(config.data)) if config.knn_every else None
    return len(stored.classes) if stored and stored.labelled else 0


def choose_images(config: PretrainConfig) -> list[tuple[Path, np.ndarray]]:
    """Which images vote and which are asked, each as (file, sample ids): class-balanced, the same at every start.

    Asked are images of val.beton beside the training file, which the training never sees; where there is none, or none
    with labels, training images that do not vote. Raises UserError for files that do not belong together.
    """
    path = labelled_file(config.data) or train_beton(config.data)
    beside, train = held_out(path), open_stored(path)
    share = config.knn_images / len(train)
    if beside.is_file() and beside != path and (val := open_stored(beside)).labelled:
        if val.classes != train.classes[: len(val.classes)]:  # numbered classes may lack the last ones
            try:
                require_same_classes(str(path), train.classes, str(beside), val.classes)
            except UserError as error:
                raise UserError(f"--knn-every: {error}, or leave it out") from None
        votes = balanced_subset(config.seed, train.labels, min(1.0, share))
        asked = balanced_subset(config.seed, val.labels, min(1.0, config.knn_images / len(val)))
        return [(path, votes), (beside, asked)]
    votes = balanced_subset(config.seed, train.labels, min(MOST_THAT_VOTE, share))
    rest = np.setdiff1d(np.arange(len(train)), votes)
    if not len(rest):
        raise UserError(f"--knn-every: {path} has {len(train)} images, too few to vote and to be asked; leave it out")
    asked = rest[balanced_subset(config.seed, train.labels[rest], min(1.0, config.knn_images / len(rest)))]
    return [(path, votes), (path, asked)]


def percent_first(ranks: torch.Tensor) -> float:
    """Top-1, %, of the labels' ranks (M,) among the classes, 0 = first."""
    return 100 * (ranks == 0).double().mean().item()


class OnlineKnn:
    """As a context; `begin` after an update, `report` once a step.

    Does nothing without --knn-every, off rank 0, and for images without labels, which a note says.
    """

    def __init__(self, update: Update):
        self.update, self.config, self.ranks = update, update.config, update.ranks
        self.every_steps = self.config.knn_every * update.steps_per_epoch
        self.active = self.config.knn_every > 0 and self.ranks.rank == 0
        self.stopped, self.pool = threading.Event(), ThreadPoolExecutor(1, "knn")
        self.loaders: list[Loader] = []
        if self.active and not labelled_file(self.config.data):
            say(self.ranks, f"note: no nearest-neighbour accuracies in this run: {self.config.data} has no labels")
            self.active = False
        if not self.active:
            return
        self.chosen = choose_images(self.config)
        self.backbone = copy.deepcopy(update.method.backbone).eval().requires_grad_(False)
        self.linear = copy.deepcopy(update.linear.layer).requires_grad_(False) if update.linear else None
        if not update.linear:
            say(self.ranks, "note: no online linear accuracies in this run: the images it trains on have no labels")
        device = self.ranks.device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.running: tuple[int, Future] | None = None

    def due(self, step: int) -> bool:
        """Whether it is to be measured after `step` updates."""
        return self.active and (step % self.every_steps == 0 or step == self.update.stop_step)

    @torch.no_grad()
    def begin(self, step: int, log: RunLog) -> None:
        """Copies the weights as they are after `step` updates, and starts to measure them."""
        self.report(log, wait=True)
        if not self.active:
            return
        self.backbone.load_state_dict(self.update.method.backbone.state_dict())
        if self.linear and self.update.linear:
            self.linear.load_state_dict(self.update.linear.layer.state_dict())
        event = torch.cuda.current_stream().record_event() if self.stream else None
        self.running = step, self.pool.submit(self._measure, event)

    def report(self, log: RunLog, wait: bool = False) -> None:
        """Writes the accuracy that is under way, if it is there. An error is noted once and ends no training."""
        if not self.active or self.running is None or not (wait or self.running[1].done()):
            return
        (step, future), self.running = self.running, None
        try:
            log.note_accuracy(step, future.result())
        except (UserError, torch.OutOfMemoryError) as error:
            self.active = False
            say(self.ranks, f"note: no more nearest-neighbour accuracies in this run: {error}")

    def _measure(self, weights_are_there: torch.cuda.Event | None) -> dict[str, float]:
        """Runs in the thread. Grad mode, autocast and stream are each thread's own."""
        with torch.cuda.stream(self.stream), torch.no_grad():
            if self.stream and weights_are_there:
                self.stream.wait_event(weights_are_there)
            self.loaders = self.loaders or [self._loader(*chosen) for chosen in self.chosen]
            (bank, bank_labels), (queries, labels) = (self._features(loader) for loader in self.loaders)
            neighbours = min(KNN_HEADLINE, len(bank))
            classes = len(self.loaders[0].classes)
            ranks = knn_ranks(bank, bank_labels, queries, labels, classes, (neighbours,))[neighbours]
            found = {"knn_top1": percent_first(ranks), "knn_images": len(bank) + len(queries)}
            if self.linear:
                found["linear_top1"] = percent_first(label_ranks(self.linear(queries), labels))
            return found

    def _loader(self, path: Path, ids: np.ndarray) -> Loader:
        c = self.config
        return make_loader(
            LoaderConfig(
                data=path,
                views=centre_view(c.resolution),
                resolution_px=c.resolution,
                global_batch=BATCH,
                shuffle=False,
                ids=ids,
                check_bytes=c.check_bytes,
                normalization=NORMALIZATIONS[c.views],
                backend="dali" if path.name.endswith(SHARDS) else "fast",
                workers=1,
                device=str(self.ranks.device),
                views_on=c.views_on,
            )
        )

    def _features(self, loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, D) float32 and labels (N,) of one pass."""
        device, amp, rows, labels = self.ranks.device.type, self.config.amp, [], []
        for batch in loader.batches():
            if self.stopped.is_set():
                raise UserError("the run was stopped")
            with torch.autocast(device, AMP[amp], enabled=amp != "off"):
                rows.append(self.backbone(batch.views[0]).float())
            labels.append(batch.label)
        return torch.cat(rows), torch.cat(labels)

    def __enter__(self) -> "OnlineKnn":
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
        for loader in self.loaders:
            loader.close()
