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
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from eval import detection, heads, knn, linear, report, semisup, svm, transfer
from eval.features import open_encoder, random_sha256
from eval.splits import open_dataset
from eval.subject import RESULTS, SubjectConfig, read_results, result_folder
from pipeline.command import DATA, REPO, run_command
from pipeline.disk import followed_once
from pipeline.errors import UserError
from pipeline.storage.sources.voc2007 import voc_root
from train.checkpoint import BackboneInfo

# Dataset under --data-root → what to fetch and where it goes.
WANTED = {
    "imagenet": "ImageNet-1k (ILSVRC 2012; image-net.org, after registration) as train/ and val/ in $IMAGENET, then "
    "`bash scripts/convert_imagenet.sh`",
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
    """A run folder or a checkpoint file; the results go into the folder."""
    key: str = ""
    """Which network of a file that holds several, as for every evaluation."""
    data: Path | None = None
    """For the ImageNet protocols. None: the data the encoder was trained on, else imagenet under --data-root."""
    data_root: Path = DATA
    """Where the datasets lie: imagenet, VOCdevkit, places205, inat18, coco."""
    only: tuple[str, ...] = ()
    """Names of evaluations, as --plan prints them; none given: all."""
    seeds: int = 1
    """Trainings of each semi-supervised evaluation."""
    workers: int = 0
    """Of every loader; 0: one a core."""
    small: bool = False
    """One epoch and few costs everywhere: shows that all of it works here. Its results are marked "-modified"."""
    plan: bool = False
    """Print what would run and what is missing, and end."""


@dataclass(frozen=True)
class Job:
    """One evaluation: its name, what it runs, with what, its protocol, and its dataset's name in WANTED.

    settings    those of the protocol that it changes, as a result names them
    """

    name: str
    main: Callable
    config: SubjectConfig | detection.DetectionConfig
    protocol: str
    needs: str = "imagenet"
    settings: dict = field(default_factory=dict)


def jobs_of(config: EvalAllConfig, data: Path) -> list[Job]:
    """Everything there is, in the order from minutes to days."""
    run, root = config.run, config.data_root.expanduser()
    shared = {"checkpoint": run, "key": config.key, "data": data, "workers": config.workers}
    short = {"epochs": 1} if config.small else {}

    def linear_job(name: str, recorded: str, **flags) -> Job:
        settings = linear.LinearConfig(**shared, **short, **flags)
        return Job(name, linear.main, settings, recorded, settings=short)

    def semisup_job(percent: int) -> Job:
        settings = semisup.SemisupConfig(**shared, **short, fraction=percent / 100, seeds=config.seeds)
        return Job(f"semisup-{percent}", semisup.main, settings, "semisup-bt", settings=short)

    def transfer_job(dataset: str) -> Job:
        settings = transfer.TransferConfig(**shared | {"data": root / dataset}, **short, dataset=dataset)
        return Job(dataset, transfer.main, settings, f"transfer-{dataset}", dataset, short)

    def detection_job(task: str, needs: str, folder: Path) -> Job:
        few = {"iterations": 1, "batch": 1, "precise_bn": 1} if config.small else {}
        where = {"checkpoint": run, "key": config.key, "data": folder, "workers": config.workers}
        settings = detection.DetectionConfig(task=task, **where, **few)
        return Job(f"detection-{task}", detection.main, settings, detection.PROTOCOLS[task].name, needs, few)

    def svm_job() -> Job:
        fewer = {"costs": (1.0,), "low_shot_k": (1,), "samples": 1} if config.small else {}
        changes = {"costs": [1.0], "low_shot_k": [1], "low_shot_samples": 1} if config.small else {}
        settings = svm.SvmConfig(**shared | {"data": root / "voc07"}, voc=root / "VOCdevkit", **fewer)
        return Job("svm", svm.main, settings, "svm-voc07", "voc", changes)

    return [
        Job("knn", knn.main, knn.KnnConfig(**shared), "knn-mmselfsup"),
        Job("knn-random", knn.main, knn.KnnConfig(**shared, features="random"), "knn-mmselfsup"),
        linear_job("cached", "linear-cached", cached=True),
        linear_job("cached-random", "linear-cached", cached=True, features="random"),
        linear_job("cached-sweep", "linear-cached-sweep", cached=True, sweep=True),
        semisup_job(1),
        semisup_job(10),
        svm_job(),
        linear_job("linear", "linear-bt"),
        linear_job("avgpool", "linear-avgpool", protocol="avgpool"),
        Job("heads", heads.main, heads.HeadsConfig(**shared, **short), "heads-mmselfsup", settings=short),
        transfer_job("places205"),
        transfer_job("inat18"),
        detection_job("voc", "voc0712", root / "VOCdevkit"),
        detection_job("coco", "coco", root / "coco"),
    ]


FROM_THE_ENCODER = {"resolution_px", "pooling"}  # settings that follow from the encoder, not from a flag of a job


def is_done(job: Job, results: list[dict], info: BackboneInfo) -> bool:
    """Whether there is a result of this job, of this encoder and of the dataset that the job would use now."""
    config = job.config
    detects = job.needs in DETECTION
    expected = {
        "checkpoint_sha256": random_sha256(info, config.seed) if config.features == "random" else info.sha256,
        "key": info.key,
        "resolution_px": info.resolution_px,
        "seed": config.seed,
        "fraction": None if detects else getattr(config, "fraction", 1.0),
    }
    found = []
    for r in results:
        changed = {name: value for name, value in r["changed"].items() if name not in FROM_THE_ENCODER}
        same = all(r.get(name, "") == value for name, value in expected.items())
        # What the published settings measured serves a --small call as well.
        same &= r["protocol"].removesuffix("-modified") == job.protocol and changed in ({}, job.settings)
        if same and len(r["details"].get("seeds", [0])) >= getattr(config, "seeds", 1):
            found.append(r["dataset_sha256"])
    return bool(found) and digests_now(job) in found


def digests_now(job: Job) -> dict | None:
    """Of the dataset that a job would use; None where it cannot be opened, which the job itself will say."""
    try:
        if job.needs in DETECTION:
            train, val = detection.open_splits(job.config)
            return {"train": train.sha256(), "val": val.sha256()}
        return open_dataset(job.config.data).sha256()
    except UserError:
        return None


def folder_of(data: Path) -> Path:
    return data.parent if data.suffix == ".beton" else data


def missing_data(job: Job, root: Path) -> str:
    """What to fetch for a job, "" where its dataset is here. VOC is converted on the way, where it is unpacked."""
    if job.needs in DETECTION:
        found = all((root / part).is_dir() for part in DETECTION[job.needs])
    elif job.needs == "voc":
        found = voc_root(root / "VOCdevkit") is not None
    else:
        found = all((folder_of(job.config.data) / f"{split}.beton").is_file() for split in ("train", "val"))
    return "" if found else WANTED[job.needs].format(root=root)


def convert_voc(job: Job) -> None:
    """VOC's images into the .beton files that the SVMs read; at once where they are there.

    In a process of its own: the converter's workers start at once where nothing but it is loaded.
    """
    command = [sys.executable, REPO / "pipeline" / "convert.py", "--source", job.config.voc, "--out", job.config.data]
    if subprocess.run([*command, "--workers", str(job.config.workers)], stdout=sys.stderr).returncode:
        raise UserError(f"{job.config.voc} could not be converted; the converter says why above")


def main(config: EvalAllConfig) -> None:
    config = replace(config, run=followed_once(config.run))
    root, folder = config.data_root.expanduser(), result_folder(config.run)
    info = open_encoder(config.run, key=config.key).info
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
        if lacking := missing_data(job, root):
            states[job.name], missing[job.needs] = f"{job.needs} is missing", lacking
        elif is_done(job, results, info):
            states[job.name] = "done before"
        else:
            states[job.name] = "would run" if config.plan else run_job(job, info)
    summarize(states, missing)
    if not config.plan and (folder / RESULTS).is_file():
        report.main(report.ReportConfig(runs=(folder,)))
    if any(state.startswith("failed") for state in states.values()):
        sys.exit(1)


def run_job(job: Job, info: BackboneInfo) -> str:
    """Runs one evaluation and says what came of it; the next ones follow, whatever it was."""
    print(f"== {job.name}", file=sys.stderr, flush=True)
    try:
        if job.needs == "voc":
            convert_voc(job)
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


def summarize(states: dict[str, str], missing: dict[str, str]) -> None:
    for name, state in states.items():
        print(f"{name:22} {state}")
    for name, text in missing.items():
        print(f"missing {name}: {text}")


if __name__ == "__main__":
    run_command(EvalAllConfig, main)
