"""Features on disk: files that say whose they are, and that notice when a byte of them has changed.

    <run folder>/features/<hash of the description>.safetensors
        features                   (N, D) float32 or float16
        metadata: description      everything that decides the numbers (eval/features.py), as JSON
        metadata: sha256           of the description and every byte of the features

A damaged file is named and counts as none: its features are extracted again.
"""

import json
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.content import content_sha256

FEATURES_VERSION = 2  # raise it when the same description would give other numbers, or the files change


class DamagedFeatures(Exception):
    """A file of features that is not what was written."""


def read_features(path: Path, description: str) -> torch.Tensor | None:
    """Kept features; None where there are none, or damaged ones, which are named.

    Raises UserError for a whole file whose content is something else's.
    """
    if not path.is_file():
        return None
    try:
        found, features = read_whole(path)
    except DamagedFeatures as error:
        print(f"{path} is damaged ({error}): extracting the features again", file=sys.stderr, flush=True)
        return None
    if found != description:
        raise UserError(
            f"{path} holds features of another checkpoint, dataset or view than its name says; delete it and run again"
        )
    return features


def find_features(folder: Path, **wanted) -> torch.Tensor | None:
    """Kept features whose description has these values, whatever their type and loader, float32 before float16.

    Unless `wanted` says otherwise, those of centre crops and of the network's own output.
    None where there are none; damaged ones are named and passed over.
    """
    wanted = {"version": FEATURES_VERSION, "squash": None, "stage": None} | wanted
    candidates = []
    for path in sorted(folder.glob("*.safetensors")):
        about = described(path)
        if all(about.get(name) == value for name, value in wanted.items()):
            candidates.append((about.get("dtype") != "float32", about.get("loader") != "ffcv", path))
    for _, _, path in sorted(candidates):
        try:
            return read_whole(path)[1]
        except DamagedFeatures as error:
            print(f"{path} is damaged ({error}) and left out", file=sys.stderr, flush=True)
    return None


def described(path: Path) -> dict:
    """What a file says of its features, unchecked; {} where it does not say."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["description"])
        return about if isinstance(about, dict) else {}
    except Exception:  # a damaged header shows in several types of error
        return {}


def read_whole(path: Path) -> tuple[str, torch.Tensor]:
    """The description and the features of a file, compared with their digest. Raises DamagedFeatures."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            features = file.get_tensor("features")
    except MemoryError:
        raise
    except Exception as error:  # see described
        raise DamagedFeatures(str(error).split("\n")[0]) from error
    description = about.get("description", "")
    if about.get("sha256") != content_sha256([description, features]):
        raise DamagedFeatures("its content is not what its sha256 is of")
    return description, features


def keep_features(path: Path, description: str, features: torch.Tensor) -> None:
    """Writes a file that is there whole or not at all. Where the disk does not take it, says so and continues."""
    about = {"description": description, "sha256": content_sha256([description, features])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, safetensors.torch.save({"features": features}, about))
    except (OSError, UserError) as error:
        print(f"features not kept in {path.parent} ({error}): the next evaluation extracts them again", file=sys.stderr)
