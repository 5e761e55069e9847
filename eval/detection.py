"""Detection: the encoder as the body of Faster R-CNN on PASCAL VOC, or of Mask R-CNN on COCO, fine-tuned whole.

    python eval/detection.py --data VOCdevkit                                     the newest run, on VOC07+12
    torchrun --nproc-per-node=8 eval/detection.py --task coco --data DIR          COCO, boxes and masks
    python eval/detection.py --checkpoint resnet50.pth --export-detectron2 resnet50.pkl

Protocol detection-voc0712: R50-C4, trained on VOC2007 and VOC2012 trainval for 24,000 iterations of 16 images, learning
rate 0.1, which 1000 iterations of warm-up reach from a third of it, a tenth of it after 18,000 and 22,000; judged on
VOC2007 test by AP, AP50 and AP75 as Detectron2 measures VOC (11-point averages; `coco_AP` … are pycocotools' of the
same detections). Protocol detection-coco: the 1× schedule, 90,000 iterations with steps after 60,000 and 80,000,
learning rate 0.03, warm-up from a thousandth of it; pycocotools' AP of boxes and masks on val2017. The schedules are
Zbontar 2021's (the warm-up of VOC: VISSL's rn50_transfer_voc0712_simclr_swav.yaml, lines 3 to 5), the rest is MoCo's:
see eval/detector/model.py, also for what differs from Detectron2.

Started again, the same command continues from its last checkpoint, <run>/detection-<task>/checkpoint.pt; SIGTERM and
Ctrl-C write one first. The detections stay beside it, in COCO's results form. One such training at a time writes there.
"""

import json
import pickle
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from eval.detector.coco import open_coco
from eval.detector.data import DetectionImages, Split, open_voc
from eval.detector.model import detectron2_weights, make_detector
from eval.detector.scores import coco_scores, voc_scores
from eval.detector.training import Schedule, Training, detect, take_precise_statistics, train
from eval.features import Encoder, open_encoder
from eval.folder import made_result_folder, result_folder
from eval.protocols import DETECTION as PROTOCOLS
from eval.subject import EncoderConfig, encoder_facts, require_positive, write_result
from pipeline.command import DATA, run_command
from pipeline.disk import followed_once, write_whole
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.stopping import exit_code
from train.agreement import only_writer
from train.batchnorm import with_global_batch_norm
from train.distributed import Ranks, joined_ranks, largest, say


@dataclass(frozen=True)
class DetectionConfig(EncoderConfig):
    """Detection, with instance segmentation on COCO."""

    task: Literal["voc", "coco"] = "voc"
    """Which dataset and protocol."""
    data: Path | None = None
    """VOCdevkit with VOC2007 (and VOC2012), or COCO's folder. None: data/VOCdevkit or data/coco."""
    features: Literal["encoder", "random"] = "encoder"
    """The encoder, or, as a control, its architecture with random weights (of --seed)."""
    iterations: int | None = None
    """None: the protocol's, 24,000 or 90,000. The learning rate falls at the same shares of them as published."""
    batch: int | None = None
    """Images of one iteration over all ranks. None: 16."""
    lr: float | None = None
    """Learning rate, not scaled by the batch. None: 0.1 for VOC, 0.03 for COCO."""
    warmup: int | None = None
    """Iterations of linear warm-up. None: 1000."""
    warmup_from: float | None = None
    """Share of the learning rate at which the warm-up begins. None: 0.3333 for VOC, 0.001 for COCO."""
    sizes: tuple[int, ...] | None = None
    """Lengths of an image's shorter side in training, px; the last is the test's. None: 480 … 800, COCO 640 … 800."""
    rois: int | None = None
    """Regions of an image that train the heads. None: 512."""
    precise_bn: int | None = None
    """Batches over which batch norm's statistics are computed again before the test. None: 200."""
    checkpoint_every: int = 1000
    """Iterations between two checkpoints."""
    workers: int = 4
    """Processes that decode images, of each rank; 0: none but the trainer's own."""
    seed: int = 0
    """Decides the heads' initial weights, the order of images, flips, sizes and sampled regions."""
    export_detectron2: Path | None = None
    """Write the backbone to this .pkl file in Detectron2's layout, and do nothing else."""


def chosen_settings(config: DetectionConfig, train: Split) -> dict:
    """The protocol's settings with the flags laid over them. Raises UserError."""
    settings = PROTOCOLS[config.task].with_flags(config) | {"train": train.name}
    if config.sizes is not None:
        settings["sizes_px"] = list(config.sizes)
    for name, least in {"iterations": 1, "batch": 1, "warmup": 0, "rois": 1, "precise_bn": 0}.items():
        if settings[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {settings[name]} was given, at least {least} is expected")
    if not 0 <= settings["warmup_from"] <= 1:
        raise UserError(
            f"--warmup-from {settings['warmup_from']:g} was given, a share of the rate, 0 to 1, is expected"
        )
    require_positive("sizes", min(settings["sizes_px"], default=0))
    if settings["batch"] > len(train):
        raise UserError(f"--batch {settings['batch']} is more than the {len(train)} images of {train.name}")
    return settings


def open_splits(config: DetectionConfig) -> tuple[Split, Split]:
    """Training and test images. Raises UserError."""
    if config.task == "coco":
        root = config.data or DATA / "coco"
        train, test = open_coco(root, "train2017"), open_coco(root, "val2017")
        train = Split(train.name, train.classes, [r for r in train.records if (~r.ignored).any()])
        if train.classes != test.classes:
            raise UserError(f"{train.name} and {test.name} have other categories; unpack both from the same release")
    else:
        root = config.data or DATA / "VOCdevkit"
        years = ["VOC2007", "VOC2012"] if (root / "VOC2012").is_dir() else ["VOC2007"]
        train, test = open_voc(root, [(year, "trainval") for year in years]), open_voc(root, [("VOC2007", "test")])
    for split in (train, test):
        if not any((~r.ignored).any() for r in split.records):
            raise UserError(f"{split.name} has no object that counts, all are difficult or crowds; unpack it again")
    return train, test


def scores_of(task: str, split: Split, detections: list[dict]) -> dict[str, float]:
    """The values of the result."""
    truth = split.truth()
    boxes = coco_scores(truth, detections, "bbox")
    if task == "voc":
        return voc_scores(split, detections) | {f"coco_{name}": value for name, value in boxes.items()}
    masks = coco_scores(truth, detections, "segm")
    return boxes | {f"mask_{name}": value for name, value in masks.items()}


def export(config: DetectionConfig, out: Path) -> None:
    """Writes the backbone for Detectron2."""
    weights = detectron2_weights(open_encoder(config.checkpoint.expanduser(), key=config.key, arch=config.arch).module)
    write_whole(out, pickle.dumps(weights))
    print(f"{out}: {len(weights['model'])} tensors in Detectron2's layout")


def make_training(
    config: DetectionConfig, ranks: Ranks, encoder: Encoder, images: Split, folder: Path, writer: OneWriter | None
) -> Training:
    """The detector with its schedule, continued from its checkpoint where there is one. Raises UserError."""
    settings = chosen_settings(config, images)
    if settings["batch"] % ranks.world_size:
        raise UserError(f"--batch {settings['batch']} cannot be shared by {ranks.world_size} ranks; give a multiple")
    schedule = Schedule(
        steps=PROTOCOLS[config.task].milestones_at(settings["iterations"]),
        seed=config.seed,
        **{name: settings[name] for name in ("iterations", "batch", "lr", "warmup", "warmup_from", "precise_bn")},
    )
    torch.manual_seed(config.seed)
    detector = make_detector(
        encoder.module.to("cpu"),
        encoder.info.normalization,
        classes=len(images.classes),
        masks=config.task == "coco",
        sizes_px=settings["sizes_px"],
        rois=settings["rois"],
    )
    detector = with_global_batch_norm(detector.to(ranks.device))
    about = settings | {"task": config.task, "seed": config.seed, "encoder": encoder.info.sha256}
    about |= {"images": images.sha256()}
    training = Training(detector, schedule, ranks, config.workers, folder / "checkpoint.pt", about, writer)
    training.resume()
    return training


def require_one_checkpoint(ranks: Ranks, sha256: str) -> None:
    """All ranks end where they read different files: a training replaced the checkpoint between their reads."""
    number = int(sha256[:15], 16)
    if largest(ranks, number) != number or -largest(ranks, -number) != number:
        text = "the ranks read different checkpoints, because a training writes there; wait for it or name another file"
        raise UserError(text) if ranks.rank == 0 else SystemExit(2)


def measure(config: DetectionConfig, ranks: Ranks) -> dict | int | None:
    """Trains, tests and records; returns the result on rank 0, or the exit code where a signal stopped it."""
    started = time.monotonic()
    require_positive("checkpoint-every", config.checkpoint_every)
    config = replace(config, checkpoint=followed_once(config.checkpoint))
    random_seed = config.seed if config.features == "random" else None
    encoder = open_encoder(config.checkpoint, random_seed=random_seed, key=config.key, arch=config.arch)
    require_one_checkpoint(ranks, encoder.info.sha256)
    train_split, test_split = open_splits(config)
    run = made_result_folder(config.checkpoint, config.out)
    folder = run / f"detection-{config.task}"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); make {run} writable") from None
    with only_writer(folder, ranks, "the evaluation in") as writer:
        training = make_training(config, ranks, encoder, train_split, folder, writer)
        say(ranks, f"{folder}: from iteration {training.iteration}, {len(train_split)} images")
        masks = config.task == "coco"
        images = DetectionImages(train_split.records, masks=masks, keep_ignored=config.task == "voc", seed=config.seed)
        if asked := train(training, images, config.checkpoint_every):
            say(ranks, f"stopped after iteration {training.iteration}; the same command continues from there")
            return exit_code(asked)
        take_precise_statistics(training, images)
        detections = detect(training, test_split, masks)
        if writer is None:  # of all ranks but the first
            return None
        writer.require()
        write_whole(folder / "detections.json", json.dumps(detections))
        return record(config, training, encoder, (train_split, test_split), detections, started)


def record(
    config: DetectionConfig,
    training: Training,
    encoder: Encoder,
    splits: tuple[Split, Split],
    detections: list[dict],
    started: float,
) -> dict:
    """Scores the detections, and prints and keeps the result; returns its line."""
    train_split, test_split = splits
    protocol = PROTOCOLS[config.task]
    about = {
        **encoder_facts(encoder, config.checkpoint),
        "dataset": test_split.name,
        "dataset_sha256": {"train": training.about["images"], "val": test_split.sha256()},
        "fraction": None,
        "split": train_split.name,
        "train_images": len(train_split),
        "val_images": len(test_split),
        "classes": len(train_split.classes),
        "seed": config.seed,
    }
    return write_result(
        result_folder(config.checkpoint, config.out),
        protocol,
        settings={name: training.about[name] for name in protocol.settings},
        values=scores_of(config.task, test_split, detections),
        details={},
        about=about,
        world_size=training.ranks.world_size,
        seconds=round(time.monotonic() - started, 2),
    )


def main(config: DetectionConfig) -> dict | None:
    """Measures, or exports; returns the result's line on rank 0. Ends with a code where a signal stopped it."""
    if config.export_detectron2:
        export(config, config.export_detectron2)
        return None
    with joined_ranks() as ranks:
        made = measure(config, ranks)
    if isinstance(made, int):
        sys.exit(made)
    return made


if __name__ == "__main__":
    run_command(DetectionConfig, main)
