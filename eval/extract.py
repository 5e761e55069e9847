"""Keeps a frozen encoder's features of a dataset's two files, by as many processes as torchrun starts.

    torchrun --nproc-per-node=8 eval/extract.py --checkpoint runs/NAME --data DIR

The ranks share the parts of a set, through files in the run folder alone; a part that is there already is not made
again. knn.py, linear.py and svm.py with the same flags then find the features instead of extracting them.
"""

import os
import sys
from dataclasses import dataclass

from eval.kept import read_features
from eval.subject import SubjectConfig, open_subject
from pipeline.command import run_command
from pipeline.errors import UserError


@dataclass(frozen=True)
class ExtractConfig(SubjectConfig):
    """Feature extraction, with the flags that the evaluation will have."""


def main(config: ExtractConfig) -> None:
    """Extracts and keeps this rank's parts. Raises UserError."""
    if config.features == "pixels":
        raise UserError("--features pixels was given; raw pixels are not kept, reading them again is as fast")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    subject = open_subject(config)
    for features in (subject.feature_set("train"), subject.feature_set("val")):
        if world_size == 1:
            features.read()
        elif read_features(features.path, features.description) is None:
            made = sum(len(part) for part in features.parts(rank, world_size))
            print(f"rank {rank} of {world_size}: {made} images of {features.beton.path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(ExtractConfig, main)
