"""Checkpoints: written whole or not at all, resumed to the step, and read back as a backbone for evaluation.

A run folder holds `checkpoint.pt`, the newest state, before it `checkpoint-<step>.pt`, and at the end of the run
`backbone.safetensors`, the backbone alone under torchvision's or timm's own parameter names. A checkpoint is a
plain dict that `torch.load(weights_only=True)` accepts:

    format, version     what this file is
    config              the PretrainConfig as a plain dict
    backbone            what rebuilds the backbone: BackboneInfo without `sha256`
    step                updates done; with the seed in `config` it decides every later batch and view
    images              size of the training set, which decides the order of samples
    views               the method's view table, a dict a view
    model, optimizer, scaler    state dicts
    online_linear       the same of the linear layer beside the model, in runs that have one
    content_sha256      the digest of all of the above, which train/content.py checks
"""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from pipeline.command import shown
from pipeline.disk import remove_temporaries, write_whole
from pipeline.errors import UserError
from pipeline.spec import Normalization, is_whole
from train.content import (
    DamagedFile,
    MissingFile,
    is_dense,
    is_plain,
    parsed_tensor_file,
    read_once,
    read_state,
    tensor_file,
    write_state,
)
from train.foreign import COUNTER, below, find_encoder, told_normalization
from train.model import make_backbone, own_side_px

FORMAT, VERSION = "barlow-at-speed checkpoint", 1
CHECKPOINT, BACKBONE = "checkpoint.pt", "backbone.safetensors"
STEMS = ("imagenet", "small", "solo-learn")
MOST_PX = 1 << 14  # of a view's side that a file may tell
LOOKS = 5  # at a run folder whose files a training replaces meanwhile
NO_ROOM = "make room there or put the run elsewhere with --name, then start the same command again"


@dataclass(frozen=True)
class BackboneInfo:
    """What an evaluation needs to know of a backbone. `step` and `epochs` are 0 where the file does not tell.

    data             folder or .beton file it was trained on, "" where the file does not tell
    dataset_sha256   digest of the images it was trained on (train/run_data.py), "" where the file does not tell
    sha256           of the file it was read from, so that a number can name its checkpoint
    key              its place in somebody else's file (train/foreign.py), "" in a file of ours
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
    dataset_sha256: str = ""
    sha256: str = ""
    key: str = ""


class Stored(NamedTuple):
    """A checkpoint that was read: the dict, where it stood, and the sha256 of the bytes that it was read from."""

    state: dict
    path: Path
    sha256: str


class Network(NamedTuple):
    """A backbone, what is known of it, and the weights beside it in its file, by the names of a method's parts."""

    backbone: nn.Module
    info: BackboneInfo
    heads: dict[str, torch.Tensor]
    of_a_run: bool


def save_checkpoint(folder: Path, state: dict, *, before: int | None = None, keep: int = 1) -> None:
    """Writes `checkpoint.pt`; the one that was there, if it is that of step `before`, is kept under that step.

    Of all checkpoints the `keep` newest stay. Raises UserError like `write_whole`.
    """
    keep_as = folder / f"checkpoint-{before:08d}.pt" if before is not None and keep > 1 else None
    write_state(folder / CHECKPOINT, {"format": FORMAT, "version": VERSION, **state}, keep_as, NO_ROOM)
    own = f"checkpoint-{state['step']:08d}.pt"
    earlier = earlier_checkpoints(folder)
    later = [path for path in earlier if path.name >= own]  # of a run that this one started over
    for path in {*later, *[path for path in earlier if path not in later][keep - 1 :]}:
        path.unlink()


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Those before `checkpoint.pt`, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def remove_run_before(folder: Path) -> None:
    """Removes the checkpoints and the export of a run that is started over."""
    for path in (folder / CHECKPOINT, *earlier_checkpoints(folder), folder / BACKBONE):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes, at once, the GB that a process left behind which was killed while it wrote. For the only writer."""
    for name in (CHECKPOINT, BACKBONE):
        remove_temporaries(folder / name, older_than_s=0.0)


def newest_checkpoint(folder: Path) -> Stored | None:
    """The newest checkpoint of a run that can be read; None where there is none at all.

    Passes over damaged ones, and looks again where a training that runs replaced those that it saw. Raises UserError
    where all are damaged, or one is of another version.
    """
    for _ in range(LOOKS):
        damaged, replaced = None, False
        for path in _newest_first(folder):
            try:
                return read_stored(path)
            except MissingFile:
                replaced = replaced or path.name != CHECKPOINT
            except DamagedFile as error:
                damaged = damaged or error
        if not replaced:
            break
    if damaged:
        raise damaged
    return None


def _newest_first(folder: Path):
    """Lists the earlier ones once the newest was not there: it may have become one of them at that moment."""
    yield folder / CHECKPOINT
    yield from earlier_checkpoints(folder)


def read_checkpoint(path: Path) -> dict:
    """The dict in a checkpoint of ours, tensors on the CPU. Raises UserError for anything else."""
    return read_stored(path).state


def read_stored(path: Path) -> Stored:
    """A checkpoint of ours and the sha256 of its file, from one read. Raises UserError for anything else."""
    state, sha256 = read_state(path)
    if not _is_ours(state):
        raise UserError(f"{path} is not a checkpoint of this program; give a run folder or its {CHECKPOINT}")
    _require_usable(state, path)
    return Stored(state, path, sha256)


def _is_ours(state: object) -> TypeGuard[dict]:
    return isinstance(state, dict) and state.get("format") == FORMAT


def _require_usable(state: dict, path: Path) -> None:
    """Raises UserError for another version, DamagedFile for a state that lacks what is read of it."""
    if is_whole(version := state.get("version"), 0) and version != VERSION:
        raise UserError(
            f"{path} has checkpoint version {version}, this program reads version {VERSION}; "
            "use the program version that wrote it"
        )
    config, model, views = state.get("config"), state.get("model"), state.get("views", [])
    good = {
        "config": isinstance(config, dict) and is_plain(config),
        **{name: is_whole(state.get(name), 0) for name in ("version", "step", "images")},
        "views": isinstance(views, list) and all(isinstance(view, dict) for view in views) and is_plain(views),
        "model": isinstance(model, dict) and all(isinstance(name, str) for name in model),
    }
    if wrong := [name for name, holds in good.items() if not holds]:
        raise DamagedFile(f"{path} is damaged: its {', '.join(wrong)} cannot be used; choose another checkpoint")
    _info(state.get("backbone"), path)


def longer_text(folder: Path) -> str:
    """How a run is trained longer: its schedule ends where it ends, so the rest is a run of its own."""
    flags = shlex.join(["--init-from", shown(folder), "--name", f"{folder.name}-longer"])
    return f"to train longer, let a new run begin with its weights: the same command with {flags}"


def export_backbone(folder: Path, backbone: nn.Module, info: BackboneInfo) -> None:
    """Writes `backbone.safetensors`: torchvision's and timm's own names, the info as metadata.

    One line each: `torchvision.models.resnet50().load_state_dict(safetensors.torch.load_file(path), strict=False)`,
    `timm.create_model("resnet50", num_classes=0, checkpoint_path=path)`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_whole(folder / BACKBONE, tensor_file(tensors, {"backbone": json.dumps(asdict(info))}), advice=NO_ROOM)


def load_backbone(path: str | Path, key: str = "", arch: str = "") -> tuple[nn.Module, BackboneInfo]:
    """The backbone of a run folder or file, in eval mode on the CPU: a module (B, 3, H, W) → (B, features).

    Files: our checkpoint.pt and backbone.safetensors; the published Barlow Twins resnet50.pth and checkpoint.pth;
    any state dict of a torchvision ResNet, or of the `arch` that is named, under whatever prefix, and `key` for one of
    several (train/foreign.py says how). Of a run folder it is the newest checkpoint that is not damaged. The file is
    read once: weights, info and sha256 are of the same bytes. Raises UserError for everything else.
    """
    network = read_network(path, key, arch)
    backbone, info, path = network.backbone, network.info, Path(path).expanduser()
    if network.of_a_run:
        if arch:
            text = f"--arch {arch} says what somebody else's file holds, {path} is of a run and tells that itself"
            raise UserError(text)
        return backbone, info
    side_px, normalization = own_side_px(backbone) or 224, told_normalization(path, info.arch, backbone)
    return backbone, replace(info, resolution_px=side_px, normalization=normalization)


def read_network(path: str | Path, key: str = "", arch: str = "") -> Network:
    """`load_backbone`, and the weights of what stands beside the backbone, {} where the file has none.

    `arch` is not looked at where the file is of a run; the views of somebody else's network are not told.
    """
    path = Path(path).expanduser()
    content: object
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, str] = {}
    if path.is_dir():
        content, path, sha256 = newest_or_refuse(path)
    elif path.suffix == ".safetensors":
        data = read_once(path)
        tensors, about = parsed_tensor_file(data, path)
        content, sha256 = tensors, hashlib.sha256(data).hexdigest()
    else:
        content, sha256 = read_state(path)

    of_a_run = _is_ours(content) or "backbone" in about
    if key and of_a_run:
        raise UserError(
            f"--key {key} chooses among several networks of a file, {path} is of a run and has one backbone"
        )
    if _is_ours(content):
        _require_usable(content, path)
        weights, info = below(content["model"], "backbone."), _info(content["backbone"], path)
        heads = {n: w for n, w in content["model"].items() if not n.startswith("backbone.") and is_dense(w)}
    elif "backbone" in about:
        weights, info, heads = tensors, _info(about["backbone"], path), {}
    else:
        place = find_encoder(content, path, key, arch)
        weights, info, heads = place.weights, BackboneInfo(place.arch, place.stem, key=place.name), place.heads
    backbone, features = _with_weights(info, weights, path)
    return Network(backbone.eval(), replace(info, features=features, sha256=sha256), heads, of_a_run)


def _with_weights(info: BackboneInfo, weights: dict, path: Path) -> tuple[nn.Module, int]:
    """The network that a file names, with the weights that stand in it. Raises UserError where they do not fit."""
    try:
        backbone, features = make_backbone(info.arch, info.stem)
    except UserError as error:
        reason = str(error).removeprefix("--arch ")
        raise UserError(f"{path} names a network that cannot be built: {reason}") from error
    own = {name: weight.is_floating_point() for name, weight in backbone.state_dict().items()}
    try:
        backbone.load_state_dict(weights)
        for name, weight in weights.items():  # which takes numbers of any kind
            if weight.is_floating_point() != own[name] and not name.endswith(COUNTER):
                raise TypeError(f"{name} of {weight.dtype}")
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} does not fit the architecture it names, {info.arch} ({info.stem} stem)") from error
    return backbone, features


def newest_or_refuse(folder: Path) -> Stored:
    """`newest_checkpoint`, with a note where that is not `checkpoint.pt`. Raises UserError where there is none."""
    newest = newest_checkpoint(folder)
    if newest is None:
        raise MissingFile(f"there is no checkpoint {folder / CHECKPOINT}; give a run folder or a checkpoint file")
    if newest.path.name != CHECKPOINT:
        text = f"note: {folder / CHECKPOINT} is damaged or missing; taken is {newest.path.name} of step"
        print(text, newest.state["step"], file=sys.stderr, flush=True)
    return newest


def _info(told: Any, path: Path) -> BackboneInfo:
    """What a file of ours tells of its backbone: a dict, or JSON. Raises DamagedFile where that cannot be used."""
    try:
        plain: dict[str, Any] = dict(json.loads(told) if isinstance(told, str) else told)
        known = {f.name: plain[f.name] for f in fields(BackboneInfo) if f.name in plain}
        pixels = plain["normalization"]
        info = BackboneInfo(**known | {"normalization": Normalization(tuple(pixels["mean"]), tuple(pixels["std"]))})
        wrong = [f.name for f in fields(info) if type(getattr(info, f.name)) is not f.type]  # a bool is no int
        if wrong:
            raise TypeError(f"{', '.join(wrong)} of another kind")
        numbers = 0 < info.resolution_px <= MOST_PX and min(info.step, info.epochs, info.seed) >= 0
        if not numbers or info.stem not in STEMS or "\0" in info.data:
            raise ValueError("a value that no run has")
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        text = f"{path} is damaged: what it tells of its backbone cannot be used ({' '.join(str(error).split())})"
        raise DamagedFile(f"{text}; choose another checkpoint") from error
    return info
