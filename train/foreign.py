"""An encoder in somebody else's checkpoint: found by the names of its parameters, chosen by a stated rule.

An encoder stands wherever, below a common prefix, are exactly the parameters of a network that this program builds: all
its names and shapes and no others, but for batch norm's counters and heads. Heads are what HEADS names, by the first
part of a name below the prefix; anything else there makes it another network. Without --arch the networks are
torchvision's ResNets; else the one that --arch names; else the one that timm's config.json beside the file names. A
ResNet's children in a Sequential, as lightly keeps them, get their names first. The encoder's place is the way there,
names joined by dots: `state_dict.module.encoder_q`. Where a file holds several:

    1. --key chooses: a place, or names from the middle of one, as in --key encoder_k
    2. otherwise the network that was trained comes before averages of it: what a place calls momentum, target, key,
       teacher or EMA is left out
    3. where more than one remains, the file is refused and the places are listed

Which one was taken is said on stderr. Three networks of timm cannot be told from a ResNet by their parameters, since
what they add has none (anti-aliased strides): they are recognized by the file's name or what the file says of itself.
Nor can MoCo v3's ViT-S from timm's, which has half as many attention heads: it is refused in MoCo v3's layout. Nor can
solo-learn's stem for CIFAR, which is padded by 2: it is taken where a 3×3 stem stands in solo-learn's layout.
"""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.spec import Normalization
from train.content import content_sha256, is_dense
from train.model import make_backbone, network_names, torchvision_resnets

# resnetblur18, resnetblur50, resnetaa50: of timm 1.0's, the only ones with exactly the parameters of a plain ResNet.
ANTI_ALIASED = re.compile(r"resnet(blur|aa)\d+")
AVERAGES = {"momentum", "target", "key", "k", "teacher", "ema", "average", "averaged", "swa", "slow", "shadow"}
HEADS = {
    *("fc", "head", "heads", "classifier", "last_linear", "head_dist"),  # classifiers, in MoCo and SimSiam projectors
    *("projection_head", "projector", "prediction_head", "predictor", "prototypes", "queue", "queue_ptr"),  # SwAV …
    *("mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"),  # MAE
}
COUNTER = "num_batches_tracked"  # of batch norm; older files have none
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}
DEEPEST = 50  # nested dicts
SAID = 6  # names of a file that a refusal lists


@dataclass(frozen=True)
class Place:
    """An encoder in a file: where, which one, its weights, and what stands beside a network named `backbone`."""

    name: str
    arch: str
    stem: str
    weights: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]

    @property
    def is_average(self) -> bool:
        """Whether its place names it as one: encoder_k, model_ema, targetNet, state_dict_ema …"""
        return not AVERAGES.isdisjoint(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", self.name))


def find_encoder(content, path: Path, key: str = "", arch: str = "") -> Place:
    """The encoder that the rule above chooses. Raises UserError where there is none, or the rule does not decide."""
    about, places, rejected = timm_config(path), [], []
    archs = network_names(arch) if arch else sorted(torchvision_resnets(), key=lambda name: name != "resnet50")
    for way, tensors in _dicts_of_tensors(content, path):
        for prefix in _prefixes(tensors, archs, whole_resnets=not arch):
            name = _on_one_line(".".join([*way, prefix]).strip("."))
            for one in archs:
                place, misfits = _compared(name, prefix, tensors, one)
                if misfits:
                    rejected.append((len(misfits), name, _on_one_line(misfits[0])))
                    continue
                places.append(place)
                if not arch:
                    break  # a ResNet is one of them alone, and building the others takes seconds
    if not places and not arch and isinstance(about.get("architecture"), str):
        return find_encoder(content, path, key, _told_arch(about["architecture"], path))
    chosen = _chosen(places, path, key, arch) if places else _refuse(content, path, arch, rejected)
    _refuse_what_parameters_do_not_tell(content, path, chosen)
    return chosen


def _told_arch(architecture: str, path: Path) -> str:
    """timm's network by the name in config.json. Raises UserError where timm has none of that name."""
    try:
        return network_names(f"timm:{architecture}")[0]
    except UserError as error:
        reason = str(error).removeprefix("--arch ")
        raise UserError(f"{path}: the architecture in its config.json, {reason}; pass --arch, or correct it") from None


def _refuse_what_parameters_do_not_tell(content, path: Path, chosen: Place) -> None:
    """Raises UserError for a file whose network computes something else with the same parameters."""
    about = timm_config(path)
    if chosen.arch.removeprefix("timm:") == about.get("architecture") and (own := _own_args(about)):
        raise UserError(
            f"{path}: its config.json builds {about['architecture']} with {own}, which this "
            "program does not; save the network under an architecture of timm that has these by its name"
        )
    if chosen.arch == "timm:vit_small_patch16_224" and _is_moco_v3(content, chosen.name):
        raise UserError(
            f"{path} is MoCo v3's ViT-S, whose attention has 12 heads: it has the parameters of {chosen.arch}, which "
            "has 6, and computes something else with them; give MoCo v3's ViT-B or ResNet-50"
        )
    if (told := _anti_aliased(content, path)) and told not in chosen.arch:
        raise UserError(
            f"{path} is {told} by its name or content: it has the parameters of {chosen.arch} and computes something "
            f"else with them; pass --arch timm:{told}, give a plain ResNet, or rename the file if its name is wrong"
        )


def _own_args(about: dict) -> dict:
    """What timm's config.json changes of an architecture; since timm 1.0.31 it names also what is as usual."""
    args = about.get("model_args") or {}
    if not isinstance(args, dict):
        return {"model_args": args}
    with contextlib.suppress(ImportError):  # earlier versions write what was changed alone
        import timm
        from timm.models._input import get_model_args

        usual = json.loads(json.dumps(get_model_args(timm.create_model(about["architecture"])), default=str))
        args = {name: value for name, value in args.items() if name != "num_classes" and value != usual.get(name)}
    return args


def _is_moco_v3(content, place: str) -> bool:
    """By its encoders' names, or by the architecture that its linear classifier's file names."""
    named = {"base_encoder", "momentum_encoder"} & set(place.split("."))
    return bool(named) or (isinstance(content, dict) and content.get("arch") == "vit_small")


def _dicts_of_tensors(value, path: Path, way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every dict in a nested one, with the keys that lead to it, and the tensors that it holds itself by name."""
    if len(way) > DEEPEST:
        raise UserError(f"{path} nests more than {DEEPEST} dicts; keep the weights alone in a file")
    if isinstance(value, dict):
        tensors = {name: w for name, w in value.items() if isinstance(name, str) and is_dense(w)}
        yield way, _with_names(tensors)
        for name, item in value.items():
            yield from _dicts_of_tensors(item, path, (*way, str(name)))


def _with_names(tensors: dict) -> dict:
    """The same tensors, a ResNet's children in a Sequential by their names: 4.0.conv1.weight → layer1.0.conv1.weight"""
    for prefix in _starts(tensors, "7.0.conv1.weight"):
        if f"{prefix}0.weight" in tensors and f"{prefix}4.0.conv1.weight" in tensors:
            for number, child in CHILDREN.items():
                old, new = f"{prefix}{number}.", f"{prefix}{child}."
                tensors = {new + n.removeprefix(old) if n.startswith(old) else n: w for n, w in tensors.items()}
    return tensors


def _starts(tensors: dict, ending: str) -> list[str]:
    """What stands before this name, or these last parts of a name: "", "module.encoder_q." …"""
    return [name.removesuffix(ending) for name in tensors if f".{name}".endswith(f".{ending}")]


def _prefixes(tensors: dict, archs: list[str], *, whole_resnets: bool) -> list[str]:
    """Below which of them one of these networks may stand: where its first parameter is."""
    some = archs[:1] if whole_resnets else archs  # a ResNet's has the same name in all of them
    firsts = dict.fromkeys(next(iter(expected_shapes(arch, "imagenet"))) for arch in some)
    prefixes = dict.fromkeys(prefix for first in firsts for prefix in _starts(tensors, first))
    return [prefix for prefix in prefixes if f"{prefix}layer4.0.conv1.weight" in tensors or not whole_resnets]


def below(tensors: dict, prefix: str) -> dict:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def _compared(name: str, prefix: str, tensors: dict, arch: str) -> tuple[Place, list[str]]:
    """The network below a prefix as one of this architecture, and in what its parameters are not those of one."""
    found, stem = below(tensors, prefix), "imagenet"
    if arch in torchvision_resnets() and found["conv1.weight"].shape[-1:] == (3,):
        stem = "solo-learn" if _is_solo_learn(prefix, tensors) else "small"
    expected = expected_shapes(arch, stem)
    shapes = {n: tuple(found[n].shape) for n in expected if n in found}
    misfits = [n for n in found if n not in expected and n.split(".")[0] not in HEADS]
    misfits += [f"no {n}" for n in expected if n not in found and not n.endswith(COUNTER)]
    misfits += [f"{n} of {shapes[n]}, not {expected[n]}" for n in shapes if shapes[n] != expected[n]]
    above = prefix.removesuffix("backbone.")
    beside = below(tensors, above) if above != prefix else {}
    heads = {n: w for n, w in beside.items() if not n.startswith("backbone.")}
    return Place(name, arch, stem, {n: found.get(n, torch.tensor(0)) for n in expected}, heads), misfits


def _is_solo_learn(prefix: str, tensors: dict) -> bool:
    """Whether a network stands as in solo-learn's checkpoints: beside a classifier and a projector or DINO's head."""
    above = re.sub(r"(momentum_)?backbone\.$", "", prefix)
    parts = {name.split(".")[0] for name in below(tensors, above)}
    return above != prefix and "classifier" in parts and not parts.isdisjoint({"projector", "head"})


@functools.cache
def expected_shapes(arch: str, stem: str) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of an architecture, by name."""
    try:
        with torch.device("meta"):
            network = make_backbone(arch, stem)[0]
    except RuntimeError:  # it calculates with tensors while it is built, which takes numbers
        network = make_backbone(arch, stem)[0]
    return {name: tuple(w.shape) for name, w in network.state_dict().items()}


def _chosen(places: list[Place], path: Path, key: str, arch: str) -> Place:
    listed = ", ".join(dict.fromkeys(place.name or "(no prefix)" for place in places))
    if len(fits := sorted({place.arch for place in places})) > 1 and arch:
        choice = " or ".join(f"--arch {one}" for one in fits)
        raise UserError(f"{path} fits {' and '.join(fits)}, which compute different things; say which: {choice}")
    if key:
        wanted = key.strip(".")
        fitting = [p for p in places if f".{wanted}." in f".{p.name}."]
        fitting = [p for p in fitting if p.name == wanted] or fitting
        if len(fitting) != 1:
            what = "none" if not fitting else f"{len(fitting)} of them, where one was expected"
            raise UserError(f"--key {key} names {what}: {path} holds {_kind(arch)} at {listed}; choose one of these")
        return fitting[0]
    left = places if len(places) == 1 else [place for place in places if not place.is_average] or places
    if len(left) > 1:  # one network under two names is one
        left = list({content_sha256(place.weights): place for place in reversed(left)}.values())[::-1]
    if len(left) > 1:
        raise UserError(
            f"{path} holds several {_kind(arch)} ({listed}), and none is plainly the one that was trained; choose one "
            "with --key, or keep one alone in a file"
        )
    if len(places) > 1:
        text = f"note: {path} holds {_kind(arch)} at {listed}; taken is {left[0].name}, and --key takes another"
        print(text, file=sys.stderr, flush=True)
    return left[0]


def _on_one_line(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _kind(arch: str) -> str:
    return f"networks of {arch}" if arch else "ResNets"


def _refuse(content, path: Path, arch: str, rejected: list[tuple[int, str, str]]):
    """Raises the UserError for a file without the network that was looked for: what was, and which names there are."""
    why = ""
    if rejected:
        _, name, misfit = min(rejected)
        why = f" (below {name or 'no prefix'} stands another network, with {misfit})"
    dicts = _dicts_of_tensors(content, path)
    names = [_on_one_line(".".join([*way, *name.split(".")[:2]])) for way, found in dicts for name in found]
    parts = list(dict.fromkeys(names))
    found = ", ".join(parts[:SAID]) + ", …" * (len(parts) > SAID) or "no tensors by name"
    what = f"no {arch}, by torchvision's or timm's parameter names" if arch else "no ResNet known to torchvision"
    raise UserError(
        f"{path} holds {what}{why}; found: {found}; give a run folder, its checkpoint, or a state dict of a ResNet "
        "with torchvision's names, or name another network with --arch, such as timm:vit_small_patch16_224"
    )


def timm_config(path: Path) -> dict:
    """timm's config.json beside a file, {} where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):  # no such file, or no JSON in it
        about = json.loads((path.parent / "config.json").read_bytes())
        return about if isinstance(about, dict) else {}
    return {}


def told_normalization(path: Path, arch: str, backbone: nn.Module) -> Normalization:
    """What a file's views are normalized with: as timm's config.json beside it says, else as ImageNet's are.

    The latter is said where timm's own weights of the architecture have another one. Raises UserError for numbers in
    config.json that cannot be used.
    """
    about, usual = timm_config(path), Normalization()
    if arch.removeprefix("timm:") == about.get("architecture"):
        try:
            own = about.get("pretrained_cfg", about)
            return Normalization(tuple(own.get("mean", usual.mean)), tuple(own.get("std", usual.std)))
        except (AttributeError, TypeError, UserError) as error:
            text = f"{path}: the mean and std in its config.json cannot be used ({error}); correct them there"
            raise UserError(text) from error
    own = getattr(backbone, "pretrained_cfg", {})
    if tuple(own.get("mean", usual.mean)) != usual.mean:
        print(
            f"note: {path}: views are normalized with ImageNet's mean; timm's own weights of {arch} were trained with "
            f"{own['mean']}: for these, put their config.json beside the file",
            file=sys.stderr,
            flush=True,
        )
    return usual


def _anti_aliased(content, path: Path) -> str | None:
    """The name of an anti-aliased network, where the file's name, its content or timm's config.json says so."""
    about = content if isinstance(content, dict) else {}
    told = [path.name, *(about.get(name) for name in ("arch", "architecture", "model_name"))]
    told.append(timm_config(path).get("architecture"))
    found = (ANTI_ALIASED.search(text.lower()) for text in told if isinstance(text, str))
    return next((match.group() for match in found if match), None)
