"""Every command and every Python block of the READMEs is run by a test: the tables here say by which.

A command that a README gained needs a line in COMMANDS: `Small` runs it here, on a few images; a string "file::name"
is a test elsewhere that runs it, or a script of the continuous integration that has it.
"""

import re
import runpy
from typing import NamedTuple

import pytest
import torch

from tests.checkout import SMALL, make_checkout, run
from tests.support import REPO

READMES = sorted(p for p in [*REPO.glob("*.md"), *REPO.glob("*/README.md")] if p.name != "CHANGELOG.md")
BEGINS = r"(?:python|bash|torchrun|sbatch|pytest|pip|source|git|\.venv/\S+|[A-Z_]+=\S+|\w+\.py|…)\s+\S"


class Small(NamedTuple):
    """Run here, in the order of the table: words of the command → others, and what is added to it."""

    instead: dict[str, str]
    more: str = ""


WALK = "tests/test_promised_commands.py::test_convert_pretrain_semisup"
RANKS = "tests/test_promised_commands.py::test_two_ranks_make_the_same_run_as_one"
HOSTS = "tests/test_torchrun.py::test_a_host_that_is_cut_off_and_comes_back"
METHODS = "tests/test_compare.py::test_every_method_with_every_seed"
ABLATIONS = "tests/test_compare.py::test_every_ablation_is_one_that_can_be_trained"
GPU_REPORT = "tests/test_gpu_report.py::test_the_command"
BENCH = "python scripts/bench"
SMALL_RUN = SMALL.replace("resnet18", "resnet10_narrow")
SMALL_BENCH = "--bank 500 --queries 300 --epochs 2 --repeats 2 --dimensions 16 --workers 1"

COMMANDS: dict[str, Small | str] = {
    # set-up, tests, the demo: what the continuous integration is made of
    "bash scripts/setup.sh": "scripts/demo.sh::bash scripts/setup.sh",
    "bash scripts/setup.sh --dali": "scripts/test.sh::bash scripts/setup.sh --dali",
    "bash scripts/setup.sh --ffcv": "tests/test_setup.py::test_ffcv_is_compiled_where_all_is_there",
    "bash scripts/setup.sh --ffcv --dali": "tests/test_setup.py::test_dali_is_an_extra",
    "bash scripts/setup.sh && source .venv/bin/activate": Small({}, "&& command -v torchrun python"),
    "bash scripts/test.sh": ".ci/run::bash scripts/test.sh",
    "bash scripts/test.sh --fast": ".github/workflows/ci.yml::bash scripts/test.sh --fast",
    "bash scripts/demo.sh": ".ci/run::bash scripts/demo.sh",
    "bash .ci/run": ".github/workflows/ci.yml::bash .ci/run",
    "pip install pyarrow": 'pyproject.toml::hf = ["pyarrow"]',
    ".venv/bin/python -m pytest tests/test_lars.py": "scripts/test.sh::.venv/bin/python -m pytest",
    "pytest tests/test_world_size.py tests/test_pretrain.py tests/test_resume.py -o junit_family=legacy "
    "--junitxml FILE": "scripts/test.sh::pytest",
    "KILLS=30 pytest tests/test_resume.py tests/test_convert_stops.py -k 'sigkill or any_moment' "
    "-o junit_family=legacy --junitxml FILE": "scripts/test.sh::pytest",
    "pytest -m gpu": GPU_REPORT,
    # from images to a page
    "bash scripts/convert_imagenet.sh": WALK,
    "torchrun train/pretrain.py": WALK,
    "python eval/semisup.py --fraction 0.01": WALK,
    "python pipeline/convert.py --source photos --out data/photos --holdout 0.1": Small(
        {"photos --out": "$IMAGENET/train --out"}, "--workers 1"
    ),
    "python train/pretrain.py --data data/photos --arch resnet18 --projector 1024-1024 --resolution 64 "
    "--global-batch 128 --epochs 30 --amp off": Small(
        {"resnet18": "resnet10_narrow", "1024-1024": "32-32", "64": "32", "128": "16", "30": "1"}, "--workers 1"
    ),
    "python eval/knn.py": Small({}),
    "python eval/report.py": Small({}, "&& test -s runs/latest/report.html"),
    "python pipeline/convert.py --source WHAT --out data/mine": Small({"WHAT": "$IMAGENET"}, "--workers 1"),
    "python train/pretrain.py": Small({}, f"--data data/mine {SMALL_RUN} --name one"),
    "python eval/extract.py --checkpoint FILE --images WHAT --to features.safetensors": Small(
        {"FILE": "runs/one", "WHAT": "$IMAGENET/val"}, "--workers 1 && test -s features.safetensors.tsv"
    ),
    "bash scripts/eval_all.sh RUN": Small({"RUN": "runs/one"}, "--plan"),
    f"{BENCH}/evaluations.py --checkpoint runs/demo --json results/eval-speed/speeds.json": Small(
        {"runs/demo": "runs/one", "results/eval-speed/": ""}, SMALL_BENCH
    ),
    "report.py RUN1 RUN2": "tests/test_report.py::test_two_runs_side_by_side",
    "python eval/report.py RUN": Small({"RUN": "runs/one"}, "&& test -s runs/one/report.html"),
    "python train/pretrain.py --preset cifar10-demo --arch resnet10_narrow": (
        "scripts/demo.sh::train/pretrain.py --preset cifar10-demo"
    ),
    "python train/pretrain.py --preset cifar10-demo --epochs 1 --log-every 1": (
        "scripts/demo.sh::train/pretrain.py --preset cifar10-demo"
    ),
    "python -m pipeline.preview --data DIR --images 4 --seed 17 --out views.png": Small({"DIR": "data/mine"}),
    "pip wheel . --no-deps": "tests/test_wheel.py::test_what_it_holds",
    "python -m train.pretrain": "tests/test_wheel.py::test_a_run_from_images_to_the_page",
    # at scale
    "torchrun --nproc-per-node=8 train/pretrain.py": RANKS,
    "torchrun --nnodes=… train/pretrain.py": HOSTS,
    "torchrun --max-restarts": "tests/test_torchrun.py::test_a_killed_rank_is_started_again",
    "torchrun --nnodes=… --nproc-per-node=1 pipeline/convert.py …": "tests/test_convert_parts.py::test_torchrun",
    "sbatch scripts/pretrain.slurm": "tests/test_pretrain_slurm.py::test_75_goes_back_into_the_queue",
    "python scripts/compare.py methods": METHODS,
    "python scripts/compare.py methods --seeds 0 1 2 -- --workers 1 --arch resnet10_narrow": METHODS,
    "… ablations": ABLATIONS,
    "python scripts/compare.py ablations -- --workers 1 --arch resnet10_narrow": ABLATIONS,
    # what others wrote
    "convert.py --source X.beton": "tests/test_adopt.py::test_adopting_in_place_and_again",
    "… --source X.ffcv --out data/x/train.beton": "tests/test_adopt.py::test_a_link_elsewhere",
    "convert.py --source TARS": "tests/test_webdataset.py::test_in_place",
    "… --source TARS --out data/x": "tests/test_webdataset.py::test_images_labels_and_order_are_the_tars",
    "python eval/svm.py --checkpoint FILE": "tests/test_svm.py::test_every_class_at_its_validated_cost",
    "python eval/semisup.py --fraction 0.01 --seeds 5 --norm-images 32 --validate-every 20 --workers 1": (
        "tests/test_norm_groups.py::test_the_flag_changes_the_training_and_the_protocols_name"
    ),
    "semisup.py --save FILE.safetensors": "tests/test_semisup.py::test_timm_loads_the_saved_network_in_one_line",
    # measurements
    f"{BENCH}/rival.py --data data/imagenette --images DIR --resolution 64 --out results/rival/imagenette --seed 0": (
        "tests/test_rival.py::test_a_stopped_run_continues"
    ),
    f"{BENCH}/rival.py --data data/cifar10 --images data/cifar10/source --out results/rival/cifar10 --seed 0": (
        "tests/test_rival.py::test_a_stopped_run_continues"
    ),
    "python scripts/doctor.py": "tests/test_doctor.py::test_what_a_report_of_a_fault_needs",
    "python scripts/doctor.py --data data/imagenet": "tests/test_doctor.py::test_the_command",
    "bash scripts/gpu_report.sh": GPU_REPORT,
    "bash tests/null_cuda/build.sh OUT": "tests/test_null_cuda.py::null_cuda",
    "PYTHONPATH=. bash OUT/run .venv/bin/python tests/null_cuda_child.py memory WAY BATCH": (
        "tests/test_null_cuda.py::test_the_estimate_is_what_steps_take"
    ),
    f"{BENCH}/loader.py --images DIR --repeats 7 --json results/views-cpu/speeds.json --checks "
    "results/views-cpu/checks.json": "tests/test_bench_loader.py::test_a_small_run",
    f"{BENCH}/loader.py --images DIR --threads 2 --limit 150 --repeats 7 --stored-side 0 --no-first-batch --json "
    "results/views-cpu/loaders.json": "tests/test_bench_loader.py::test_a_small_run",
    f"{BENCH}/decoders.py --images DIR --json results/decoders/differences.json": (
        "tests/test_compare_decoders.py::test_the_decoders_of_this_machine"
    ),
    f"{BENCH}/convert.py --images DIR --max-side 400 --json results/converter/400px.json": (
        "tests/test_bench_convert.py::test_the_programs_and_their_checks"
    ),
    f"{BENCH}/step.py": "tests/test_bench_step.py::test_random_images",
    f"{BENCH}/neighbours.py": "tests/test_recount_neighbours.py::test_agrees_or_says_so",
}

# A line of each Python block, which no other has → the test that runs it.
BLOCKS = {
    "for batch in loader.epoch(0):": "tests/test_readmes.py::test_the_first_loop",
    "network = resnet18(num_classes=1024)": "tests/test_library.py::test_the_readmes_loops",
    "criterion = BarlowTwinsLoss()": "tests/test_library.py::test_the_readmes_loops",
    "lightning.Trainer(max_epochs=100)": "tests/test_library.py::test_lightnings_trainer_sees_every_epoch_once",
    "class PillowPixels(Pixels):": "tests/test_loader_parts.py::new_decoder",
    "decoder = ViewsDecoder(": "tests/test_loader_ffcv.py::test_the_readmes_pipeline",
    'timm.create_model("resnet50"': "tests/test_readmes.py::test_the_encoder_in_torchvision_and_timm",
    "class Mine(Method):": "tests/test_readmes.py::test_the_new_method",
    "class MeansConfig(SubjectConfig):": "tests/test_knn.py::test_the_protocol_of_the_readme",
}


def fences(text: str) -> list[tuple[str, str]]:
    """The language and the content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> set[str]:
    """Every line of a block that is neither Python nor a diagram, and inline code that begins as a command does."""
    found = []
    for language, block in fences(text):
        if language != "python" and not re.search("[─│▶]", block):
            lines = block.replace("\\\n", " ").splitlines()
            found += [re.sub(r"(^|\s+)# .*", "", line) for line in lines]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [code for code in re.findall(r"`([^`]+)`", prose) if re.match(BEGINS, code)]
    return {" ".join(command.split()) for command in found} - {""}


def python_blocks() -> list[str]:
    """All of them, of all READMEs."""
    return [block for path in READMES for language, block in fences(path.read_text()) if language == "python"]


def block_with(line: str) -> str:
    """The one block that has this line."""
    (block,) = (block for block in python_blocks() if line in block)
    return block


def assert_is_there(proof: str) -> None:
    """The file has the function, or the text where it is no Python."""
    file, name = proof.split("::")
    text = (REPO / file).read_text()
    assert (f"def {name}(" if file.endswith(".py") else name) in text, proof


def test_what_is_found():
    """The search itself: wrapped lines, comments, diagrams, code that is no command."""
    text = "a `python x.py\n--y 1` b `python` `x.py` `--z`\n```\nbash s.sh   # why\n\npip install \\\n  p\n```\n"
    text += "```python\nimport x\n```\n```\na ──▶ python b.py\n```\n"
    assert commands(text) == {"python x.py --y 1", "bash s.sh", "pip install p"}


def test_every_command_is_run_and_no_line_is_left_over():
    written = {command: path for path in READMES for command in commands(path.read_text())}
    unknown = {f"{path.relative_to(REPO)}: {command}" for command, path in written.items() if command not in COMMANDS}
    assert not unknown, "give them a line in COMMANDS: the test that runs them, or how they are made small"
    assert not COMMANDS.keys() - written.keys(), "no README has these any more"


def test_every_python_block_is_run():
    found = [line for block in python_blocks() for line in BLOCKS if line in block]
    assert sorted(found) == sorted(BLOCKS) and len(python_blocks()) == len(BLOCKS)


def test_the_tests_that_are_named_are_there():
    for command, proof in [*COMMANDS.items(), *BLOCKS.items()]:
        if isinstance(proof, str):
            assert_is_there(proof)
            test = (REPO / proof.split("::")[0]).read_text()
            for program in re.findall(r"(\w+)\.(?:py|sh|slurm)\b", command):
                assert program in test or proof.startswith("scripts/test.sh"), f"{proof} has nothing of {command}"


def test_their_flags_are_there():
    """Those of our own programs, which are the fields of their configurations; torchrun's and pytest's stand before."""
    sources = [p.read_text() for name in ("pipeline", "train", "eval", "scripts") for p in (REPO / name).rglob("*.py")]
    known = {name for text in sources for name in re.findall(r'^    (\w+): |name="(\w+)"', text, re.MULTILINE)}
    fields = {name.replace("_", "-") for pair in known for name in pair}
    for command in COMMANDS:
        for flag in re.findall(r"--([a-z][a-z-]+)", re.split(r"\.py|\.sh", command, maxsplit=1)[-1]):
            in_script = command.startswith("bash scripts/") and f"--{flag}" in (REPO / command.split()[1]).read_text()
            ours = ".py " in command and "pytest" not in command
            assert in_script or not ours or flag.removeprefix("no-") in fields, f"{command}: there is no --{flag}"


@pytest.mark.slow
def test_commands_on_a_few_images(tmp_path, shared_data):
    code = make_checkout(tmp_path, shared_data)
    (code / "scripts" / "setup.sh").write_text("exit 0\n")  # it is set up: this environment
    for command, small in COMMANDS.items():
        if isinstance(small, Small):
            for word, other in small.instead.items():
                assert word in command
                command = command.replace(word, other)
            run(code, f"{command} {small.more}")


def test_the_first_loop(small_beton):
    """pipeline/README.md's: the batches of an epoch, two views each."""
    code = block_with("for batch in loader.epoch(0):")
    for old, new in (('"data/imagenet/train.beton"', repr(str(small_beton))), ("224, global_batch=256", "32, 16")):
        assert old in code
        code = code.replace(old, new)
    made: dict = {}
    exec(code, made)
    assert made["one"].shape == made["other"].shape == (16, 3, 32, 32) and made["batch"].step == 2


def test_the_new_method(tmp_path, monkeypatch):
    """train/README.md's, put where it says: a step of it, whose loss is NumPy's mean of squares."""
    from train.config import PretrainConfig
    from train.methods import choose
    from train.model import make_backbone

    (tmp_path / "mine.py").write_text(block_with("class Mine(Method):"))
    monkeypatch.setitem(choose.METHODS, "mine", runpy.run_path(str(tmp_path / "mine.py"))["Mine"])
    config = PretrainConfig(method="mine", arch="resnet10_narrow", projector="16-16", views="cifar10")
    method = choose.make_method(*make_backbone(config.arch), config)
    views = torch.randn(2, 8, 3, 32, 32).unbind()
    loss, metrics = method(views)
    loss.backward()
    z1, z2 = (z.detach().double().numpy() for z in method.outputs(views))
    assert loss.item() == pytest.approx(((z1 - z2) ** 2).mean(), rel=1e-4) and metrics["loss"] == loss
    assert all(p.grad.isfinite().all() for p in method.parameters()) and len(choose.view_table(config)) == 2


def test_the_encoder_in_torchvision_and_timm(tmp_path, monkeypatch):
    """README.md's, on a run's export: both give the features of the network that was trained."""
    from train.checkpoint import BackboneInfo, export_backbone
    from train.model import make_backbone

    backbone = make_backbone("resnet50")[0].eval()
    (tmp_path / "runs/NAME").mkdir(parents=True)
    export_backbone(tmp_path / "runs/NAME", backbone, BackboneInfo("resnet50"))
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    made: dict = {}
    for part in block_with("timm.create_model(").rsplit("\n\n", 1):
        exec(part, made)
        made["network"].fc = torch.nn.Identity()
        with torch.no_grad():
            assert torch.allclose(made["network"].eval()(images), backbone(images), atol=1e-5)
