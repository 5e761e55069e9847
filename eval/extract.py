"""Features of images: those of an evaluation, kept by as many processes as torchrun starts, or of any images in a file.

    torchrun --nproc-per-node=8 eval/extract.py --checkpoint runs/NAME --data DIR
    python eval/extract.py --checkpoint runs/NAME --images FOLDER --to FILE.safetensors

Without --to, the ranks share the parts of a dataset's two sets, through files in the run folder alone; a part that is
there already is not made again. knn.py and linear.py with the same flags then find the features instead of extracting
them. With --to, the images may be any that pipeline/convert.py reads, or a .beton file, without labels too:

    FILE.safetensors    features (N, D), and labels (N,) int64 if there are any; the encoder and the classes as metadata
    FILE.npy            features (N, D) alone
    FILE.….tsv          of both, beside it: of each row the file name, the label and the class

The rows are bit for bit those that evaluations extract. A folder is converted into a temporary .beton beside the
target, which is removed at the end.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eval.features import Encoder, centre_loader_config, extract_features
from eval.kept import read_features
from eval.subject import SubjectConfig, encoder_facts, encoder_of, open_subject
from pipeline.command import REPO, run_command
from pipeline.disk import followed_once, whole_file, write_whole
from pipeline.errors import UserError
from pipeline.storage.beton import Stored
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.shards import open_stored
from train.content import tensor_file
from train.launch import rank_and_world_size


@dataclass(frozen=True)
class ExtractConfig(SubjectConfig):
    """Feature extraction, with the flags that the evaluation will have."""

    images: Path | None = None
    """With --to: a folder of images, or a .beton file, all of whose images are taken."""
    split: Literal["", "train", "val", "unlabelled"] = ""
    """Which split of --images, if it has several."""
    to: Path | None = None
    """File for the features of --images, .safetensors or .npy. None: those of --data are kept for evaluations."""


def keep_for_evaluations(config: ExtractConfig, rank: int, world_size: int) -> None:
    """Extracts and keeps this rank's parts. Raises UserError."""
    if config.features == "pixels":
        raise UserError("--features pixels was given; raw pixels are not kept, reading them again is as fast")
    subject = open_subject(config)
    for features in (subject.feature_set("train"), subject.feature_set("val")):
        if world_size == 1:
            features.read()
        elif read_features(features.path, features.description) is None:
            made = sum(len(part) for part in features.parts(rank, world_size))
            print(f"rank {rank} of {world_size}: {made} images of {features.beton.path}", file=sys.stderr)


def require_one_target(config: ExtractConfig, world_size: int) -> tuple[Path, Path]:
    """(the images, the file to write), by absolute paths. Raises UserError for flags that do not go together."""
    if config.images is None or config.to is None:
        raise UserError("--images and --to go together: which images, and the file for their features")
    given = {"data": config.data, "out": config.out, "shots": config.shots, "fraction": config.fraction != 1}
    if other := [f"--{name}" for name, value in given.items() if value]:
        raise UserError(f"--to writes the features of all of --images; leave out {', '.join(other)}")
    if world_size > 1:
        raise UserError("--to is written by one process; start it without torchrun")
    to = config.to.expanduser().absolute()
    if to.suffix not in (".safetensors", ".npy") or to.is_dir() or not os.access(to.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--to {to}: give a file name that ends in .safetensors or .npy, in a folder that can be written"
        )
    images = config.images.expanduser().absolute()
    if images.suffix == ".beton" and config.split:
        raise UserError(f"--split {config.split} chooses of a folder, --images {images} is one file; leave it out")
    if stored := sorted(images.glob("*.beton")):
        raise UserError(f"--images {images} is a converted dataset; give one of its files, such as {stored[0]}")
    return images, to


def converted(images: Path, folder: Path, config: ExtractConfig) -> Path:
    """A .beton in `folder` of a folder of images, as pipeline/convert.py makes it. Raises UserError if it cannot."""
    out = folder / "images.beton"
    command = [sys.executable, str(REPO / "pipeline" / "convert.py"), "--source", str(images), "--out", str(out)]
    command += ["--workers", str(config.workers), *(["--split", config.split] if config.split else [])]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"{images} could not be converted; the converter says why above")
    return out


def write_features(config: ExtractConfig, encoder: Encoder, beton: Stored, to: Path) -> None:
    """Writes the file and the names beside it, each whole or not at all. Raises UserError."""
    loading = centre_loader_config(encoder, beton.path, None, config.loader, config.workers)
    features = extract_features(encoder, loading, getattr(torch, config.feature_type))
    lines = io.StringIO()
    rows = csv.writer(lines, "excel-tab", lineterminator="\n")
    rows.writerow(["file", "label", "class"])
    for name, label in zip(beton.file_names(), beton.labels.tolist(), strict=True):
        rows.writerow([name, *([label, beton.classes[label]] if beton.labelled else ["", ""])])
    write_whole(to.with_name(f"{to.name}.tsv"), lines.getvalue())
    if to.suffix == ".npy":
        with whole_file(to) as file:
            np.save(file, features.numpy())
    else:
        tensors = {"features": features}
        tensors |= {"labels": torch.from_numpy(beton.labels)} if beton.labelled else {}
        about = {"encoder": json.dumps(encoder_facts(encoder, config.checkpoint)), "classes": json.dumps(beton.classes)}
        write_whole(to, tensor_file(tensors, about))
    print(f"{to}: {len(features)} images, {features.shape[1]} features; their names in {to.name}.tsv")


def main(config: ExtractConfig) -> None:
    """Keeps features, or writes them to a file. Raises UserError."""
    rank, world_size = rank_and_world_size()
    if not config.images and not config.to:
        keep_for_evaluations(config, rank, world_size)
        return
    images, to = require_one_target(config, world_size)
    config = replace(config, checkpoint=followed_once(config.checkpoint))
    encoder = encoder_of(config)
    if images.name.endswith((".beton", SHARDS)):
        write_features(config, encoder, open_stored(images), to)
        return
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as folder:
        write_features(config, encoder, open_stored(converted(images, Path(folder), config)), to)


if __name__ == "__main__":
    run_command(ExtractConfig, main)
