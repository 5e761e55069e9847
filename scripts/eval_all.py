"""Every evaluation of one encoder that the datasets here allow, one after the other, and a table at the end.

    bash scripts/eval_all.sh RUN            RUN: a run folder, or a checkpoint file
    bash scripts/eval_all.sh RUN --plan     only what would run, and what is missing

A result that results.jsonl has already is not measured again, so that a stopped call continues: one of the same
checkpoint, dataset (both by digest), protocol, settings, side of the views, labels and seed. An evaluation that fails
is named and the others follow; the exit code is then 1.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from eval import detection, heads, knn, linear, report, semisup, svm, transfer
from eval.detection import DetectionConfig
from eval.features import open_encoder, random_sha256
from eval.folder import result_folder
from eval.frozen import is_resnet
from eval.splits import dataset_files, open_dataset
from eval.subject import RESULTS, SubjectConfig, read_results
from pipeline.command import DATA, REPO, run_command
from pipeline.disk import followed_once
from pipeline.errors import UserError
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.sources.voc2007 import voc_root
from train.checkpoint import BackboneInfo

# Dataset under --data-root → what to fetch and where it goes.
WANTED = {
    "imagenet": "ImageNet-1k (ILSVRC 2012; image-net.org or Kaggle, after registration) as downloaded or as train/ and "
    "val/ in $IMAGENET, then `bash scripts/convert_imagenet.sh`",
    "voc": "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar (the PASCAL VOC 2007 site), unpacked into {root}",
    "voc0712": "VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar (the PASCAL VOC 2007 site) and "
    "VOCtrainval_11-May-2012.tar (the PASCAL VOC 2012 site), unpacked into {root}",
    "coco": "train2017.zip, val2017.zip and annotations_trainval2017.zip (cocodataset.org), unpacked into {root}/coco",
    "places205": "imagesPlaces205_resize.tar.gz and trainvalsplit_places205.tar.gz (places.csail.mit.edu, after "
    "registration), unpacked into one FOLDER, then `python pipeline/convert.py --source FOLDER --out {root}/places205`",
    "inat18": "train_val2018.tar.gz, train2018.json and val2018.json (visipedia's inat_comp on GitHub has the links), "
    "unpacked into one FOLDER, then `python pipeline/convert.py --source FOLDER --out {root}/inat18`",
}


DETECTION = {  # datasets of detection → folders that must be there
    "voc0712": ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
    "coco": ("coco/train2017", "coco/val2017", "coco/annotations"),
}


@dataclass(frozen=True)
class EvalAllConfig:
    """What to evaluate, and how much of it."""

    run: tyro.conf.Positional[Path]
    """A run folder or a checkpoint file; the results go into the folder, or into FILE.results beside the file."""
    arch: str = ""
    """Which network somebody else's file holds, as for every evaluation."""
    key: str = ""
    """Which network of a file that holds several, as for every evaluation."""
    out: Path | None = None
    """Folder for the results in place of that one."""
    data: Path | None = None
    """For the ImageNet protocols. None: the data the encoder was trained on, else imagenet under --data-root."""
    data_root: Path = DATA
    """Where the datasets lie: imagenet, VOCdevkit, places205, inat18, coco."""
    only: tuple[str, ...] = ()
    """Names of evaluations, as --plan prints them; none given: all."""
    seeds: int = 1
    """Trainings of each semi-supervised evaluation."""
    workers: int = 0
    """Threads of every loader; 0: one a core."""
    small: bool = False
    """One epoch and few costs everywhere: shows that all of it works here. Its results are marked "-modified"."""
    plan: bool = False
    """Print what would run and what is missing, and end."""


@dataclass(frozen=True)
class Job:
    """One evaluation.

    protocol    its name, without "-modified"
    needs       its dataset's name in WANTED; `data` is where that lies
    changed     what --small changes of the protocol's settings
    """

    name: str
    protocol: str
    main: Callable
    config: SubjectConfig | DetectionConfig
    data: Path
    needs: str
    changed: dict[str, Any]


# What --small changes of the settings, by flags of the same names; lists, as the lines of results have them.
ONE_EPOCH = {"epochs": 1}
SMALL: dict[type, dict[str, Any]] = {
    knn.KnnConfig: {},
    svm.SvmConfig: {"costs": [1.0], "low_shot_k": [1], "low_shot_samples": 1},
    DetectionConfig: {"iterations": 1, "batch": 1, "precise_bn": 1},
}


def jobs_of(config: EvalAllConfig, data: Path) -> list[Job]:
    """Everything there is, in the order from minutes to days."""
    root = config.data_root.expanduser()
    shared = {name: getattr(config, name) for name in ("arch", "key", "out", "workers")}
    shared |= {"checkpoint": config.run, "data": data}

    # The first four are positional alone, so that `protocol` may be a flag as well.
    def job(name: str, protocol: str, main: Callable, kind: type, /, *, needs: str = "imagenet", **flags: Any) -> Job:
        changed = SMALL.get(kind, ONE_EPOCH) if config.small else {}
        made = kind(**shared | changed | flags)
        if isinstance(made, SubjectConfig) and made.data and made.data.name.endswith(SHARDS):
            made = replace(made, loader="dali")  # which alone reads them
        return Job(name, protocol, main, made, made.data, needs, changed)

    def transfer_job(to: str) -> Job:
        return job(to, f"transfer-{to}", transfer.main, transfer.TransferConfig, needs=to, data=root / to, dataset=to)

    voc, coco = root / "VOCdevkit", root / "coco"
    return [
        job("knn", "knn-mmselfsup", knn.main, knn.KnnConfig),
        job("knn-random", "knn-mmselfsup", knn.main, knn.KnnConfig, features="random"),
        job("cached", "linear-cached", linear.main, linear.LinearConfig, cached=True),
        job("cached-random", "linear-cached", linear.main, linear.LinearConfig, cached=True, features="random"),
        job("cached-sweep", "linear-cached-sweep", linear.main, linear.LinearConfig, cached=True, sweep=True),
        job("semisup-1", "semisup-bt", semisup.main, semisup.SemisupConfig, fraction=0.01, seeds=config.seeds),
        job("semisup-10", "semisup-bt", semisup.main, semisup.SemisupConfig, fraction=0.1, seeds=config.seeds),
        job("svm", "svm-voc07", svm.main, svm.SvmConfig, needs="voc", data=root / "voc07", voc=voc),
        job("linear", "linear-bt", linear.main, linear.LinearConfig),
        job("avgpool", "linear-avgpool", linear.main, linear.LinearConfig, protocol="avgpool"),
        job("heads", "heads-mmselfsup", heads.main, heads.HeadsConfig),
        transfer_job("places205"),
        transfer_job("inat18"),
        job("detection-voc", "detection-voc0712", detection.main, DetectionConfig, needs="voc0712", data=voc),
        job("detection-coco", "detection-coco", detection.main, DetectionConfig, task="coco", needs="coco", data=coco),
    ]


FROM_THE_ENCODER = {"resolution_px", "pooling"}  # settings that follow from the encoder, not from a flag of a job


def is_done(job: Job, results: list[dict], info: BackboneInfo, *, has_stages: bool = True) -> bool:
    """Whether there is a result of this job, of this encoder and of the dataset that the job would use now.

    Of a network without stages the output is evaluated, whatever the protocol's stage.
    """
    follows = FROM_THE_ENCODER | (set() if has_stages else {"stage"})
    config = job.config
    expected = {
        "checkpoint_sha256": random_sha256(info, config.seed) if config.features == "random" else info.sha256,
        "key": info.key,
        "arch": info.arch,
        "resolution_px": info.resolution_px,
        "seed": config.seed,
        "fraction": config.fraction if isinstance(config, SubjectConfig) else None,
    }
    normalization = [list(info.normalization.mean), list(info.normalization.std)]
    found = []
    for r in results:
        changed = {name: value for name, value in r["changed"].items() if name not in follows}
        same = all(r.get(name, "") == value for name, value in expected.items())
        same &= r.get("normalization", normalization) == normalization  # older lines have none
        # What the published settings measured serves a --small call as well.
        same &= r["protocol"].removesuffix("-modified") == job.protocol and changed in ({}, job.changed)
        if same and len(r["details"].get("seeds", [0])) >= getattr(config, "seeds", 1):
            found.append(r["dataset_sha256"])
    return bool(found) and digests_now(job) in found


def digests_now(job: Job) -> dict | None:
    """The digests of the dataset that a job would use; None where it cannot be opened, as the job itself will say."""
    try:
        if isinstance(job.config, DetectionConfig):
            train, val = detection.open_splits(job.config)
            return {"train": train.sha256(), "val": val.sha256()}
        return open_dataset(job.data).sha256()
    except UserError:
        return None


def missing_data(job: Job, root: Path) -> str:
    """What to fetch for a job, "" where its dataset is here. VOC is converted on the way, where it is unpacked."""
    if job.needs in DETECTION:
        found = all((root / part).is_dir() for part in DETECTION[job.needs])
    elif job.needs == "voc":
        found = voc_root(root / "VOCdevkit") is not None
    else:
        found = all(path.is_file() for path in dataset_files(job.data))
    return "" if found else WANTED[job.needs].format(root=root)


def unfit_data(job: Job) -> str:
    """Why a converted dataset cannot be evaluated on, such as for want of labels; "" where it can, or is not here."""
    try:
        if job.needs != "voc" and dataset_files(job.data)[0].is_file():  # what VOC lacks is converted on the way
            open_dataset(job.data)
    except UserError as error:
        return str(error)
    return ""


def convert_voc(config: svm.SvmConfig) -> None:
    """VOC's images into the .beton files that the SVMs read; at once where they are there.

    In a process of its own: the converter's workers start at once where nothing but it is loaded.
    """
    flags = ("--source", config.voc, "--out", config.data, "--workers", config.workers)
    command = [sys.executable, str(REPO / "pipeline" / "convert.py"), *map(str, flags)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"{config.voc} could not be converted; the converter says why above")


def main(config: EvalAllConfig) -> None:
    config = replace(config, run=followed_once(config.run))
    root, folder = config.data_root.expanduser(), result_folder(config.run, config.out)
    encoder = open_encoder(config.run, key=config.key, arch=config.arch)
    info = encoder.info
    jobs = jobs_of(config, config.data or Path(info.data or root / "imagenet"))
    unknown = set(config.only) - {job.name for job in jobs}
    if unknown:
        known = ", ".join(job.name for job in jobs)
        raise UserError(f"--only {', '.join(sorted(unknown))}: no such evaluation; there are {known}")
    states, missing = {}, {}
    for job in jobs:
        if config.only and job.name not in config.only:
            continue
        results = read_results(folder) if (folder / RESULTS).is_file() else []
        if problem := unfit_data(job):
            states[job.name] = f"cannot run: {problem}"
        elif lacking := missing_data(job, root):
            states[job.name], missing[job.needs] = f"{job.needs} is missing", lacking
        elif job.main in (heads.main, detection.main) and not is_resnet(encoder.module):
            states[job.name] = f"needs a ResNet of four stages, not {info.arch}"
        elif is_done(job, results, info, has_stages=is_resnet(encoder.module)):
            states[job.name] = "done before"
        else:
            states[job.name] = "would run" if config.plan else run_job(job, info)
    for name, state in states.items():
        print(f"{name:22} {state}")
    for name, text in missing.items():
        print(f"missing {name}: {text}")
    if not config.plan and (folder / RESULTS).is_file():
        report.main(report.ReportConfig(runs=(folder,)))
    if not config.plan and any(state.startswith(("failed", "cannot run")) for state in states.values()):
        sys.exit(1)


def run_job(job: Job, info: BackboneInfo) -> str:
    """Runs one evaluation and says what came of it; the next ones follow, whatever it was."""
    print(f"== {job.name}", file=sys.stderr, flush=True)
    try:
        if isinstance(job.config, svm.SvmConfig):
            convert_voc(job.config)
        result = job.main(job.config)
    except UserError as error:
        return f"failed: {error}"
    except Exception as error:  # a fault of ours: its traceback, and the other evaluations all the same
        traceback.print_exc()
        return f"failed: {error!r}"
    said = f"{result['metric']} {result['value']:.2f} in {result['seconds']:.0f} s"
    if job.config.features == "encoder" and result["checkpoint_sha256"] != info.sha256:
        said += f", of a newer checkpoint (step {result['step']}) than this call began with (step {info.step})"
    return said


if __name__ == "__main__":
    run_command(EvalAllConfig, main)
