"""What is converted of a dataset: which of its splits, which classes, and what is held out where there is no val."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.beton import require_same_classes
from pipeline.storage.sources.folders import split_of, unlabelled_images
from pipeline.storage.sources.open import check_names, open_source, split_names
from pipeline.storage.sources.source import Source


def open_splits(root: Path, split: str, *, one_file: bool, unlabelled: bool) -> list[Source]:
    """All splits of a dataset, or the one asked for; `one_file`: the one there is. A folder without splits is one.

    `unlabelled` takes every image below `root` as train. Raises UserError.
    """
    if unlabelled and split:
        raise UserError(f"--unlabelled takes every image below --source; give the folder of {split}, without --split")
    if unlabelled:
        split_names(root)  # raises if there is no such folder
        if not root.is_dir():
            raise UserError(f"--unlabelled takes images below a folder, and {root} is a file; leave the flag out")
        source = unlabelled_images(root, "train")
        check_names(source)
        return [source]
    if split or one_file:
        return [open_source(root, split)]
    return [open_source(root, name) for name in split_names(root) or [split_of(root)]]


def require_fitting(sources: list[Source]) -> None:
    """Splits of one dataset have the same classes. Raises UserError; images for pretraining alone need none."""
    first, *others = [source for source in sources if source.split != "unlabelled"] or sources[:1]
    for other in others:
        if first.labelled != other.labelled:
            without, having = (other, first) if first.labelled else (first, other)
            raise UserError(
                f"{without.where} has images without class folders, and {having.where} has classes; sort those images"
                f" into the same class folders, or convert one alone: --split {having.split}"
            )
        require_same_classes(str(first.where), first.classes, str(other.where), other.classes)


def of_imagenet(source: Source) -> bool:
    """Whether the classes are ImageNet's, or some of them: WordNet ids; or the images' names are those of its val."""
    by_name = all("ILSVRC2012_val_" in name for name in source.names)  # Hugging Face's classes are called "tench, …"
    return by_name or all(re.fullmatch(r"n\d{8}", name) for name in source.classes)


def note_count(source: Source) -> None:
    """ImageNet with missing images converts, and so does a folder in a folder, but not silently."""
    known = (constants.IMAGENET_TRAIN_IMAGES, constants.IMAGENET_VAL_IMAGES)
    if len(source.classes) == constants.IMAGENET_CLASSES and of_imagenet(source) and len(source) not in known:
        print(f"note: {source.where} has {len(source)} images; ImageNet has {known[0]} (train) and {known[1]} (val)")
    if source.kind == "folder" and len(source.classes) == 1:
        print(f"note: {source.where} has one class, {source.classes[0]}; if it is none, pass --unlabelled")


def take(source: Source, ids: np.ndarray) -> Source:
    """Some images of a source, in the order of `ids`."""
    return replace(
        source,
        names=[source.names[i] for i in ids],
        labels=source.labels[ids],
        extents=None if source.extents is None else source.extents[ids],
        pixels=None if source.pixels is None else source.pixels[ids],
        left_out=Counter(source.left_out),
    )


def of_classes(source: Source, path: Path) -> Source:
    """The images of the classes that a file names, in the source's order of classes.

    A line is a class, or begins with one; a single line may name all, between spaces or commas. Lines that are empty or
    begin with "#" are passed over. Raises UserError.
    """
    if source.split == "unlabelled":
        return source
    if not source.labelled:
        raise UserError(f"--classes {path}: {source.where} has images without classes; leave it out")
    try:
        content = path.read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(
            f"--classes {path} cannot be read ({error.strerror}); give a file with a class a line"
        ) from None
    known = {name: label for label, name in enumerate(source.classes)}
    lines = [line.strip() for line in content.splitlines() if line.strip() and line.strip()[0] != "#"]
    if len(lines) == 1 and lines[0] not in known and set(words := lines[0].replace(",", " ").split()) <= set(known):
        lines = words
    named = [line if line in known else line.split()[0] for line in lines]
    unknown, twice = [n for n in named if n not in known], [n for n, times in Counter(named).items() if times > 1]
    if unknown or not named:
        first = f" ({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''})" if unknown else ""
        raise UserError(
            f"--classes {path}: {len(unknown)} of its {len(named)} names are no class of {source.where}{first};"
            f" its {len(source.classes)} classes have names such as {source.classes[0]}"
        )
    if twice:
        raise UserError(f"--classes {path} names {twice[0]} twice; name every class once")
    kept = sorted(known[name] for name in named)
    new_labels = np.full(len(source.classes), -1)
    new_labels[kept] = np.arange(len(kept))
    ids = np.flatnonzero(new_labels[source.labels] >= 0)
    if not len(ids):
        raise UserError(f"--classes {path}: {source.where} has no image of these classes; name others")
    chosen = take(source, ids)
    if len(ids) < len(source):
        chosen.left_out["images of other classes"] += len(source) - len(ids)
    return replace(chosen, classes=[source.classes[k] for k in kept], labels=new_labels[chosen.labels])


def hold_out(sources: list[Source], choose: Callable[[np.ndarray], np.ndarray]) -> list[Source]:
    """Makes val of some images of train: `choose` has their labels (N,) and returns sorted ids.

    Raises UserError if there is a val, no train, or a class of which nothing would be left in train.
    """
    by_split = {source.split: source for source in sources}
    if "val" in by_split or "train" not in by_split:
        found = " and ".join(by_split)
        advice = "leave it out, or pass --split train to set that val aside" if "val" in by_split else "give train"
        raise UserError(f"--holdout makes val of images of train, but --source holds {found}; {advice}")
    train = by_split["train"]
    ids = choose(train.labels)
    rest = np.setdiff1d(np.arange(len(train)), ids)
    before, after = (np.bincount(labels, minlength=len(train.classes)) for labels in (train.labels, train.labels[rest]))
    empty = np.flatnonzero((before > 0) & (after == 0))
    if len(empty):
        name, count = train.classes[empty[0]], before[empty[0]]
        raise UserError(f"--holdout takes all images of {name}, which has {count}; hold out fewer, or add images to it")
    others = [source for source in sources if source is not train]
    return [take(train, rest), replace(take(train, ids), split="val"), *others]
