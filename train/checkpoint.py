"""Checkpoints: written whole or not at all, resumed to the step, and read back as a backbone for evaluation.

A run folder holds `checkpoint.pt`, the newest state, before it `checkpoint-<step>.pt`, and at the end of the run
`backbone.safetensors`, the backbone alone under torchvision's or timm's own parameter names. A checkpoint is a
plain dict that `torch.load(weights_only=True)` accepts:

    format, version     what this file is
    config              the PretrainConfig as a plain dict
    backbone            what rebuilds the backbone: BackboneInfo without `sha256`
    step                updates done; with the seed in `config` it decides every later batch and view
    images              size of the training set, which decides the order of samples
    model, optimizer, scaler    state dicts
"""

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from pipeline.command import UserError
from pipeline.disk import TEMPORARY, write_whole
from pipeline.spec import Normalization
from train.config import recipe
from train.model import make_backbone, torchvision_resnets

FORMAT, VERSION = "barlow-at-speed checkpoint", 1
CHECKPOINT, BACKBONE = "checkpoint.pt", "backbone.safetensors"
NO_ROOM = "make room there or put the run elsewhere with --run, then start the same command again"


@dataclass(frozen=True)
class BackboneInfo:
    """What an evaluation needs to know of a backbone. `step` and `epochs` are 0 where the file does not tell.

    data     folder or .beton file it was trained on, "" where the file does not tell
    sha256   of the file it was read from, so that a number can name its checkpoint
    """

    arch: str
    stem: str = "imagenet"
    features: int = 0
    resolution_px: int = 224
    normalization: Normalization = field(default_factory=Normalization)
    data: str = ""
    seed: int = 0
    step: int = 0
    epochs: int = 0
    sha256: str = ""


class DamagedFile(UserError):
    """A file that is there and cannot be read: cut short, or not what its name says."""


def save_checkpoint(folder: Path, state: dict, before: int | None = None, keep: int = 1) -> None:
    """Writes `checkpoint.pt`; the one that was there, if it is that of step `before`, is kept under that step.

    Of all checkpoints the `keep` newest stay. The state is serialized in memory first: a full disk cannot break it
    midway. Raises UserError like `write_whole`.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    keep_as = folder / f"checkpoint-{before:08d}.pt" if before is not None and keep > 1 else None
    write_whole(folder / CHECKPOINT, buffer.getbuffer(), keep_as, NO_ROOM)
    own = f"checkpoint-{state['step']:08d}.pt"
    earlier = earlier_checkpoints(folder)
    later = [path for path in earlier if path.name >= own]  # of a run that this one started over
    for path in {*later, *[path for path in earlier if path not in later][keep - 1 :]}:
        path.unlink()


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Those before `checkpoint.pt`, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while writing a checkpoint left behind."""
    for path in folder.glob(f".{CHECKPOINT}.*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> tuple[dict, Path] | None:
    """The newest checkpoint of a run that can be read, and its path; None where there is none at all.

    Passes over damaged ones. Raises UserError where all are damaged, or one is of another version.
    """
    damaged = None
    for path in (folder / CHECKPOINT, *earlier_checkpoints(folder)):
        if path.exists():
            try:
                return read_checkpoint(path), path
            except DamagedFile as error:
                damaged = damaged or error
    if damaged:
        raise damaged
    return None


def read_checkpoint(path: Path) -> dict:
    """The dict in a checkpoint of ours, tensors on the CPU. Raises UserError for anything else."""
    state = _load(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program; give a run folder or its {CHECKPOINT}")
    if state["version"] != VERSION:
        raise UserError(
            f"{path} has checkpoint version {state['version']}, this program reads version {VERSION}; "
            "use the program version that wrote it"
        )
    return state


def _load(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; give a run folder or a checkpoint file") from None
    except Exception as error:  # torch.load tells of a broken file in half a dozen types
        reason = str(error).split("\n")[0].split(". ")[0]
        text = f"{path} cannot be read as a checkpoint ({reason}); it may be damaged or incomplete"
        raise DamagedFile(text) from error


def refuse_other_recipe(state: dict, config: dict, images: int, path: Path) -> None:
    """Raises UserError where a checkpoint belongs to another recipe than the run that would resume it."""
    theirs, ours = recipe(state["config"]) | {"images": state["images"]}, recipe(config) | {"images": images}
    other = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    if other:
        found = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in other)
        raise UserError(
            f"{path} is of another recipe ({found}); give this run its own folder with --run, "
            "make the flags equal, or start over with --resume never"
        )


def export_backbone(folder: Path, backbone: nn.Module, info: BackboneInfo) -> None:
    """Writes `backbone.safetensors`: torchvision's and timm's own names, the info as metadata.

    One line each: `torchvision.models.resnet50().load_state_dict(safetensors.torch.load_file(path), strict=False)`,
    `timm.create_model("resnet50", num_classes=0, checkpoint_path=path)`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_whole(
        folder / BACKBONE, safetensors.torch.save(tensors, {"backbone": json.dumps(asdict(info))}), advice=NO_ROOM
    )


def load_backbone(path: str | Path) -> tuple[nn.Module, BackboneInfo]:
    """The backbone of a run folder or file, in eval mode on the CPU: a module (B, 3, H, W) → (B, features).

    Files: our checkpoint.pt and backbone.safetensors; the published Barlow Twins resnet50.pth and checkpoint.pth;
    any state dict of a torchvision ResNet, under whatever prefix. Raises UserError for everything else.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / CHECKPOINT
    if path.suffix == ".safetensors":
        weights, info = _read_safetensors(path)
    else:
        state = _load(path)
        if isinstance(state, dict) and state.get("format") == FORMAT:
            state = read_checkpoint(path)
            weights, info = _weights_below(state["model"], "backbone."), _info(state["backbone"])
        else:
            weights, info = _foreign_resnet(state, path)
    backbone, features = make_backbone(info.arch, info.stem)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the architecture it names, {info.arch} ({info.stem} stem)") from error
    return backbone.eval(), replace(info, features=features, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_below(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _info(plain: dict) -> BackboneInfo:
    known = {f.name: plain[f.name] for f in fields(BackboneInfo) if f.name in plain}
    pixels = plain["normalization"]
    return BackboneInfo(**known | {"normalization": Normalization(tuple(pixels["mean"]), tuple(pixels["std"]))})


def _read_safetensors(path: Path) -> tuple[dict, BackboneInfo]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            plain = (file.metadata() or {}).get("backbone")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no plain dict)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give a run folder or a checkpoint file") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); it may be damaged or incomplete") from error
    return (weights, _info(json.loads(plain))) if plain else _foreign_resnet(weights, path)


def _foreign_resnet(state, path: Path) -> tuple[dict, BackboneInfo]:
    """A ResNet in somebody else's state dict: found by its first convolution, told apart by names and shapes."""
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    names = [name for name in state if re.search(r"(^|\.)conv1\.weight$", name)] if isinstance(state, dict) else []
    prefix = min(names, key=len, default="").removesuffix("conv1.weight")
    weights = _weights_below(state, prefix) if names else {}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    stem = "small" if names and weights["conv1.weight"].shape[-1] == 3 else "imagenet"
    candidates = sorted(torchvision_resnets(), key=lambda arch: arch != "resnet50")  # the usual one first
    for arch in candidates if "layer4.0.conv1.weight" in weights else ():
        with torch.device("meta"):
            expected = make_backbone(arch, stem)[0].state_dict()
        if _shapes(weights) == _shapes(expected):
            return {name: weights.get(name, torch.tensor(0)) for name in expected}, BackboneInfo(arch, stem)
    raise UserError(
        f"{path} holds no ResNet known to torchvision; give a run folder, its checkpoint, "
        "or a state dict with torchvision's parameter names"
    )


def _shapes(weights: dict) -> dict:
    return {name: tensor.shape for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
