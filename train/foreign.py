"""A ResNet in somebody else's checkpoint: found by the names of its parameters, chosen by a stated rule.

A ResNet stands wherever, below a common prefix, are exactly the parameters of one that torchvision builds: all its
names and shapes and no others, but for `fc` and batch norm's counters. Its place is the way there, names joined by
dots: `state_dict.module.encoder_q`. Where a file holds several:

    1. --key chooses: a place, or names from the middle of one, as in --key encoder_k
    2. otherwise the network that was trained comes before averages of it: what a place calls momentum, target, key,
       teacher or EMA is left out
    3. where more than one remains, the file is refused and the places are listed

Which one was taken is said on stderr. Three networks of timm cannot be told from a ResNet by their parameters, since
what they add has none (anti-aliased strides): they are recognized by the file's name or what the file says of itself.
"""

import contextlib
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import UserError
from train.content import content_sha256
from train.model import make_backbone, torchvision_resnets

# resnetblur18, resnetblur50, resnetaa50: of timm 1.0's, the only ones with exactly the parameters of a plain ResNet.
ANTI_ALIASED = re.compile(r"resnet(blur|aa)\d+")
AVERAGES = {"momentum", "target", "key", "k", "teacher", "ema", "average", "averaged", "swa", "slow", "shadow"}


@dataclass(frozen=True)
class Place:
    """A ResNet in a file: where, which one, its weights, and what stands beside a network named `backbone`."""

    name: str
    arch: str
    stem: str
    weights: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]

    @property
    def is_average(self) -> bool:
        """Whether its place names it as one: encoder_k, model_ema, targetNet, state_dict_ema …"""
        return not AVERAGES.isdisjoint(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", self.name))


def find_resnet(content, path: Path, key: str = "") -> Place:
    """The ResNet that the rule above chooses. Raises UserError where there is none, or the rule does not decide."""
    places, rejected = [], []
    for way, tensors in _dicts_of_tensors(content):
        for prefix in _prefixes(tensors):
            name = ".".join([*way, prefix]).strip(".")
            place = _place(name, prefix, tensors)
            places.append(place) if place else rejected.append((name, below(tensors, prefix)))
    chosen = _chosen(places, path, key) if places else _refuse(path, rejected)
    if told := _anti_aliased(content, path):
        raise UserError(
            f"{path} is {told} by its name or content: it has the parameters of {chosen.arch} and computes something "
            "else with them; give a plain ResNet, or rename the file if its name is wrong"
        )
    return chosen


def _dicts_of_tensors(value, way: tuple[str, ...] = ()):
    """Every dict in a nested one, with the keys that lead to it, and the tensors that it holds itself by name."""
    if isinstance(value, dict):
        yield way, {name: w for name, w in value.items() if isinstance(name, str) and isinstance(w, torch.Tensor)}
        for name, item in value.items():
            yield from _dicts_of_tensors(item, (*way, str(name)))


def _prefixes(tensors: dict) -> list[str]:
    """Below which of them something like a ResNet stands: "", "module.encoder_q." …"""
    starts = [name.removesuffix("conv1.weight") for name in tensors if re.search(r"(^|\.)conv1\.weight$", name)]
    return [prefix for prefix in starts if f"{prefix}layer4.0.conv1.weight" in tensors]


def below(tensors: dict, prefix: str) -> dict:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def _place(name: str, prefix: str, tensors: dict) -> Place | None:
    """The ResNet below a prefix; None where its parameters are not exactly those of one of torchvision."""
    found = {n: w for n, w in below(tensors, prefix).items() if not n.startswith("fc.")}
    shapes = {n: tuple(w.shape) for n, w in found.items()}
    stem = "small" if shapes["conv1.weight"][-1:] == (3,) else "imagenet"
    uncounted = {n: s for n, s in shapes.items() if not n.endswith("num_batches_tracked")}
    for arch in sorted(torchvision_resnets(), key=lambda arch: arch != "resnet50"):  # the usual one first
        expected = expected_shapes(arch, stem)
        if uncounted == {n: s for n, s in expected.items() if not n.endswith("num_batches_tracked")} and (
            shapes.items() <= expected.items()
        ):
            weights = {n: found.get(n, torch.tensor(0)) for n in expected}
            above = prefix.removesuffix("backbone.")
            beside = below(tensors, above) if above != prefix else {}
            heads = {n: w for n, w in beside.items() if not n.startswith("backbone.")}
            return Place(name, arch, stem, weights, heads)
    return None


@functools.cache
def expected_shapes(arch: str, stem: str) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of an architecture, by name."""
    with torch.device("meta"):
        return {name: tuple(w.shape) for name, w in make_backbone(arch, stem)[0].state_dict().items()}


def _chosen(places: list[Place], path: Path, key: str) -> Place:
    listed = ", ".join(place.name or "(no prefix)" for place in places)
    if key:
        wanted = key.strip(".")
        fitting = [p for p in places if f".{wanted}." in f".{p.name}."]
        fitting = [p for p in fitting if p.name == wanted] or fitting
        if len(fitting) != 1:
            what = "none" if not fitting else f"{len(fitting)} of them, where one was expected"
            raise UserError(f"--key {key} names {what}: {path} holds ResNets at {listed}; choose one of these")
        return fitting[0]
    left = places if len(places) == 1 else [place for place in places if not place.is_average] or places
    if len(left) > 1:  # one network under two names is one
        left = list({content_sha256(place.weights): place for place in reversed(left)}.values())[::-1]
    if len(left) > 1:
        raise UserError(
            f"{path} holds several ResNets ({listed}), and none is plainly the one that was trained; choose one with "
            "--key, or keep one alone in a file"
        )
    if len(places) > 1:
        text = f"note: {path} holds ResNets at {listed}; taken is {left[0].name}, and --key takes another"
        print(text, file=sys.stderr, flush=True)
    return left[0]


def _refuse(path: Path, rejected: list[tuple[str, dict]]):
    """Raises the UserError for a file without a ResNet of torchvision."""
    why = ""
    if rejected:
        name, found = rejected[0]
        most = expected_shapes("resnet152", "imagenet")  # the names of all the others are among these
        other = next((n for n in found if n not in most and not n.startswith("fc.")), "other shapes")
        why = f" (below {name or 'no prefix'} stands another network, with {other})"
    raise UserError(
        f"{path} holds no ResNet known to torchvision{why}; give a run folder, its checkpoint, "
        "or a state dict with torchvision's parameter names"
    )


def _anti_aliased(content, path: Path) -> str | None:
    """The name of an anti-aliased network, where the file's name, its content or timm's config.json says so."""
    about = content if isinstance(content, dict) else {}
    told = [path.name, *(about.get(name) for name in ("arch", "architecture", "model_name"))]
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such file, or no dict in it
        told.append(json.loads((path.parent / "config.json").read_bytes()).get("architecture"))
    found = (ANTI_ALIASED.search(text.lower()) for text in told if isinstance(text, str))
    return next((match.group() for match in found if match), None)
