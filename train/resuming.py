"""What a checkpoint must share with the run that resumes it: recipe, views, images, and the form of its parts.

Whatever does not fit is refused with a sentence before the first step.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.spec import ViewSpec
from train.checkpoint import longer_text
from train.config import recipe


def refuse_other_recipe(state: dict, config: dict, images: int, path: Path) -> None:
    """Raises UserError where a checkpoint belongs to another recipe than the run that would resume it."""
    theirs, ours = recipe(state["config"]) | {"images": state["images"]}, recipe(config) | {"images": images}
    other = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    if other:
        values = (f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in other)
        found = " ".join(", ".join(values).split())  # on one line
        before = theirs.get("epochs")
        more = "epochs" in other and isinstance(before, int) and ours["epochs"] > before > 0
        longer = f"; {longer_text(path.parent)}" if more else ""
        raise UserError(
            f"{path} is of another recipe ({found}); give this run its own folder with --name, "
            f"make the flags equal, or start over with --resume never{longer}"
        )


def refuse_other_views(state: dict, views: Sequence[ViewSpec], path: Path) -> None:
    """Raises UserError where a checkpoint was trained with other views than the method's `views` of today.

    One without a table is from before SimSiam's crops for ImageNet became bilinear; all other views are as they were.
    """
    ours, config = [asdict(view) for view in views], state["config"]
    changed = {"interpolation": "bicubic"} if (config["method"], config["views"]) == ("simsiam", "imagenet") else {}
    theirs = state.get("views") or [view | changed for view in ours]
    theirs = [asdict(ViewSpec()) | view for view in theirs]  # fields that there were not yet have their default
    other = [] if len(theirs) == len(ours) else [f"{len(theirs)} views there, {len(ours)} here"]
    other += [
        f"{name} {was} there, {view.get(name)} here"
        for before, view in zip(theirs, ours, strict=False)
        for name, was in before.items()
        if was != view.get(name)
    ]
    if other:
        raise UserError(
            f"{path} was trained with other views than --method {config['method']} has in this version "
            f"({', '.join(dict.fromkeys(other))}); finish it with the version that wrote it, give this run its own "
            "folder with --name, or start over with --resume never"
        )


def refuse_other_images(state: dict, data: Path, dataset_sha256: str, path: Path) -> bool:
    """Raises UserError where a checkpoint was trained on other images than those of `data`, which have that digest.

    False where it does not tell, being older. The same images in another folder or format have the same digest.
    """
    theirs = state["backbone"].get("dataset_sha256", "")
    if theirs and dataset_sha256 and theirs != dataset_sha256:
        raise UserError(
            f"{path} was trained on the images of {state['config'].get('data')} (digest {theirs[:12]}), and --data "
            f"{data} holds other ones (digest {dataset_sha256[:12]}); point --data at the same images, give this run "
            "its own folder with --name, or start over with --resume never"
        )
    return bool(theirs) or not dataset_sha256


def load_part_(part: Any, saved: object, what: str, path: Path, advice: str) -> None:
    """Loads a network's or an optimizer's state, which is `what` of the file `path`, into it.

    Raises UserError, which ends in `advice`, where it is the state of another one.
    """
    optimizer = getattr(part, "optimizer", part)
    groups = [dict(group) for group in optimizer.param_groups] if isinstance(optimizer, torch.optim.Optimizer) else []
    try:
        part.load_state_dict(saved)
        if groups:
            _check_momentum_and_keep_(groups, optimizer)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = "there is none" if saved is None else str(error).split("\n")[0]
        raise UserError(f"{path}: its {what} does not fit this run ({reason}); {advice}") from error


def _check_momentum_and_keep_(groups: list[dict], optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer its own groups' settings back, which its run decides.

    Raises ValueError for momentum of another shape than its weight's, which PyTorch takes unseen.
    """
    for parameter, kept in optimizer.state.items():
        momentum = kept.get("momentum", kept.get("momentum_buffer"))  # LARS's, SGD's
        if kept and not (isinstance(momentum, torch.Tensor) and momentum.shape == parameter.shape):
            raise ValueError(f"no momentum for a weight of {tuple(parameter.shape)}")
    for own, group in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
