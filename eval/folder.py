"""The folder that an encoder's results go to, with its kept features, detections and report.

runs/NAME, and its checkpoint.pt, checkpoint-<step>.pt, backbone.safetensors     runs/NAME
X/resnet50.pth, or any other file                                                X/resnet50.pth.results
"""

import errno
import os
import re
from pathlib import Path

from pipeline.disk import followed_once
from pipeline.errors import UserError

OF_A_RUN = re.compile(r"checkpoint(-\d{8})?\.pt|backbone\.safetensors")


def result_folder(checkpoint: Path, out: Path | None = None) -> Path:
    """Where results go: --out, a run folder, which its checkpoint stands for, or X.pth.results beside another file."""
    if out:
        return out.expanduser()
    checkpoint = followed_once(checkpoint)
    if checkpoint.is_dir():
        return checkpoint
    return (
        checkpoint.parent if OF_A_RUN.fullmatch(checkpoint.name) else checkpoint.with_name(f"{checkpoint.name}.results")
    )


def made_result_folder(checkpoint: Path, out: Path | None) -> Path:
    """`result_folder`, which is there afterwards. Raises UserError where it cannot be written."""
    run = result_folder(checkpoint, out)
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        text = f"{run} cannot be made or written ({error.strerror}); name another folder for the result with --out"
        raise UserError(text) from None
    return run
