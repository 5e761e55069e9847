"""Every evaluation of one encoder that the datasets here allow, one after the other, and a table at the end.

    bash scripts/eval_all.sh RUN            RUN: a run folder, or a checkpoint file
    bash scripts/eval_all.sh RUN --plan     only what would run, and what is missing

A result that results.jsonl has already, of the same checkpoint, protocol, labels and dataset, is not measured again: a
stopped call goes on. An evaluation that fails is named and the others go on; the exit code is then 1.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from eval import detection, heads, knn, linear, report, semisup, svm, transfer
from eval.features import open_encoder
from eval.subject import RESULTS, SubjectConfig, read_results
from pipeline.command import DATA, REPO, UserError, run_command
from pipeline.sources import voc_root

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
    """One evaluation: its name, what it runs, with what, its protocol, and its dataset's name in WANTED."""

    name: str
    main: Callable
    config: SubjectConfig | detection.DetectionConfig
    protocol: str
    needs: str = "imagenet"


def jobs_of(config: EvalAllConfig, data: Path) -> list[Job]:
    """Everything there is, in the order from minutes to days."""
    run, root = config.run.expanduser(), config.data_root.expanduser()
    shared = {"checkpoint": run, "data": data, "workers": config.workers}
    short = {"epochs": 1} if config.small else {}
    fewer = {"costs": (1.0,), "low_shot_k": (1,), "samples": 1} if config.small else {}

    def linear_job(name: str, recorded: str, **flags) -> Job:
        return Job(name, linear.main, linear.LinearConfig(**shared, **short, **flags), recorded)

    def semisup_job(percent: int) -> Job:
        settings = semisup.SemisupConfig(**shared, **short, fraction=percent / 100, seeds=config.seeds)
        return Job(f"semisup-{percent}", semisup.main, settings, "semisup-bt")

    def transfer_job(dataset: str) -> Job:
        settings = transfer.TransferConfig(**shared | {"data": root / dataset}, **short, dataset=dataset)
        return Job(dataset, transfer.main, settings, f"transfer-{dataset}", dataset)

    def detection_job(task: str, needs: str, folder: Path) -> Job:
        few = {"iterations": 1, "batch": 1, "precise_bn": 1} if config.small else {}
        settings = detection.DetectionConfig(task=task, checkpoint=run, data=folder, workers=config.workers, **few)
        return Job(f"detection-{task}", detect, settings, detection.NAMES[task], needs)

    voc = svm.SvmConfig(**shared | {"data": root / "voc07"}, voc=root / "VOCdevkit", **fewer)
    return [
        Job("knn", knn.main, knn.KnnConfig(**shared), "knn-mmselfsup"),
        Job("knn-random", knn.main, knn.KnnConfig(**shared, features="random"), "knn-mmselfsup"),
        linear_job("cached", "linear-cached", cached=True),
        linear_job("cached-random", "linear-cached", cached=True, features="random"),
        linear_job("cached-sweep", "linear-cached-sweep", cached=True, sweep=True),
        semisup_job(1),
        semisup_job(10),
        Job("svm", svm.main, voc, "svm-voc07", "voc"),
        linear_job("linear", "linear-bt"),
        linear_job("avgpool", "linear-avgpool", protocol="avgpool"),
        Job("heads", heads.main, heads.HeadsConfig(**shared, **short), "heads-mmselfsup"),
        transfer_job("places205"),
        transfer_job("inat18"),
        detection_job("voc", "voc0712", root / "VOCdevkit"),
        detection_job("coco", "coco", root / "coco"),
    ]


def detect(config: detection.DetectionConfig) -> dict:
    """Detection on one GPU; with several, run it by torchrun, and it is found done here."""
    detection.main(config)
    checkpoint = config.checkpoint
    return read_results(checkpoint if checkpoint.is_dir() else checkpoint.parent)[-1]


def is_done(job: Job, results: list[dict], sha256: str, small: bool) -> bool:
    """Whether a result of this job is there. Only a small call is content with modified settings."""
    control = job.config.features == "random"
    for r in results:
        same = r["encoder"] == "untrained" if control else r["checkpoint_sha256"] == sha256
        same &= (r["protocol"].removesuffix("-modified") if small else r["protocol"]) == job.protocol
        same &= len(r["details"].get("seeds", [0])) >= getattr(job.config, "seeds", 1)
        if job.needs not in DETECTION:  # whose protocols name their dataset
            same &= r["dataset"] == folder_of(job.config.data).resolve().name
            same &= r["fraction"] == getattr(job.config, "fraction", 1.0)
        if same:
            return True
    return False


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
    run, root = config.run.expanduser(), config.data_root.expanduser()
    info = open_encoder(run).info
    folder = run if run.is_dir() else run.parent
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
        if is_done(job, results, info.sha256, config.small):
            states[job.name] = "done before"
        elif lacking := missing_data(job, root):
            states[job.name], missing[job.needs] = f"{job.needs} is missing", lacking
        else:
            states[job.name] = "would run" if config.plan else run_job(job)
    summarize(states, missing)
    if not config.plan and (folder / RESULTS).is_file():
        report.main(report.ReportConfig(runs=(folder,)))
    if any(state.startswith("failed") for state in states.values()):
        sys.exit(1)


def run_job(job: Job) -> str:
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
    return f"{result['metric']} {result['value']:.2f} in {result['seconds']:.0f} s"


def summarize(states: dict[str, str], missing: dict[str, str]) -> None:
    for name, state in states.items():
        print(f"{name:22} {state}")
    for name, text in missing.items():
        print(f"missing {name}: {text}")


if __name__ == "__main__":
    run_command(EvalAllConfig, main)
