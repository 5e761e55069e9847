"""Files of weights and of a run's record, damaged 300 times each: refused in one sentence that names the file, or read
as they stand, which plain JSON, safetensors and torch tell. What may happen: tests/mutants.py.
"""

import copy
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.detector.training import FORMAT, VERSION, Schedule, Training
from eval.protocols import with_all_settings
from eval.report import ReportConfig, read_runs
from eval.reporting.comparison import comparisons
from eval.reporting.facts import fact_rows, other_settings, read_config
from eval.reporting.summary import controls_ahead, newest_cells, summary_markdown
from eval.subject import read_results
from pipeline.disk import append_line, read_lines
from pipeline.errors import UserError
from tests.mutants import json_mutants, mutants, outcome, value_mutants
from tests.test_resume import CPU, TINY
from train.checkpoint import BackboneInfo, load_backbone
from train.config import as_plain
from train.content import tensor_file, write_state
from train.curves import read_curves
from train.flags import resolved
from train.foreign import expected_shapes, find_encoder, told_normalization
from train.methods.choose import view_table
from train.model import NARROW, make_backbone
from train.runstate import RunState, backbone_info
from train.update import make_update

# ---- weights ----

ARCH = "resnet8_narrow"


@pytest.fixture(scope="module", autouse=True)
def narrower():
    """The network that is written and read some thousand times has eight channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NARROW, ARCH, (8, 8, 8))
        expected_shapes.cache_clear()
        yield
    expected_shapes.cache_clear()


@pytest.fixture(scope="module")
def weights(narrower) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return make_backbone(ARCH)[0].state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(w.to(found[name].dtype), found[name]) for name, w in expected.items())


def test_safetensors_of_others(tmp_path, weights):
    """Damaged headers: their length, names, types, shapes, places; what is taken is what safetensors reads."""
    path, whole = tmp_path / "theirs.safetensors", safetensors.torch.save(weights, {"format": "pt"})
    length = int.from_bytes(whole[:8], "little")
    header, rest, refused = whole[8 : 8 + length], whole[8 + length :], 0
    files = [len(mutant).to_bytes(8, "little") + mutant + rest for mutant in json_mutants(header, 3, 260)]
    files += [mutant + rest for mutant in mutants(whole[: 8 + length], 4, 30)]
    others = (0, 1, length - 1, length + 1, len(whole), 2**31, 2**64 - 1)
    files += [other.to_bytes(8, "little") + header + rest for other in others]
    for i, mutant in enumerate([whole, *files]):
        path.write_bytes(mutant)
        found = outcome(lambda: load_backbone(path, arch=ARCH))
        if isinstance(found, UserError):
            assert str(path) in str(found), i
            refused += 1
        else:
            told = safetensors.torch.load(mutant)
            assert same(found[0].state_dict(), {n: told[n] for n in found[0].state_dict() if n in told}), i
    assert 100 < refused < 297


def test_timms_config_beside_a_file(tmp_path):
    """Another mean is taken, one that cannot be is refused, and without an architecture there is none."""
    model, path = timm.create_model("test_resnet", num_classes=0), tmp_path / "model.bin"
    sound = json.dumps({"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}})
    refused = 0

    def read():
        return told_normalization(path, find_encoder(model.state_dict(), path).arch, model)

    for mutant in json_mutants(sound.encode(), 5):
        (tmp_path / "config.json").write_bytes(mutant)
        found = outcome(read)
        if isinstance(found, UserError):
            assert str(path) in str(found)
            refused += 1
            continue
        told = json.loads(mutant)
        about = told.get("pretrained_cfg", told)
        assert told["architecture"] == "test_resnet"
        assert list(found.mean) == about.get("mean", [0.485, 0.456, 0.406])
    assert 100 < refused < 280


def test_what_an_export_tells_of_itself(tmp_path, weights):
    path = tmp_path / "backbone.safetensors"
    info = BackboneInfo(ARCH, "imagenet", 128, 32, data="/images", seed=1, step=40, epochs=5, dataset_sha256="ab" * 32)
    sound = json.dumps(asdict(info)).encode()
    for mutant in [sound, *json_mutants(sound, 6)]:
        text = mutant.decode("utf-8", "replace")
        path.write_bytes(tensor_file(weights, {"backbone": text}))
        found = outcome(lambda: load_backbone(path))
        if isinstance(found, UserError):
            assert str(path) in str(found)
            continue
        told, plain = json.loads(text), asdict(replace(found[1], sha256="", features=128))
        assert same(found[0].state_dict(), weights)
        unused = {"features", "sha256", "normalization"}  # the first two are counted again
        assert all(plain[name] == value for name, value in told.items() if name in plain and name not in unused)


# ---- checkpoints ----


def taken_or_named(path: Path, read, accept) -> int:
    """1 where a checkpoint is refused with its name; else `accept` judges what was read."""
    found = outcome(read)
    if isinstance(found, UserError):
        assert str(path) in str(found)
        return 1
    accept(found)
    return 0


def test_checkpoints(tmp_path):
    """Of a run, with a sound digest of damaged content: as a backbone, and resumed, with a step after it."""
    flags = {"run": str(tmp_path), "arch": ARCH, "projector": "8-4", "data": tmp_path / "images"}
    config, path = resolved(replace(TINY, **flags)), tmp_path / "checkpoint.pt"
    update, refused = make_update(config, CPU, steps_per_epoch=5), 0

    def stepped() -> None:
        for parameter in update.method.parameters():
            parameter.grad = torch.ones_like(parameter)
        update.optimizer.step()

    stepped()
    state = {"format": "barlow-at-speed checkpoint", "version": 1, "step": 7, "images": 43, "config": as_plain(config)}
    state |= {"backbone": asdict(backbone_info(config, 128, 7)), "views": [asdict(view) for view in view_table(config)]}
    parts = {name: part.state_dict() for name, part in update.state.items()}
    optimizer, run = copy.deepcopy(parts["optimizer"]), RunState(update, 43)

    def resumed() -> int:
        update.optimizer.load_state_dict(optimizer)
        return run.resume()

    def taken(step: int, mutant: dict) -> None:
        assert step == mutant["step"] <= 15
        stepped()

    damaged = [parts | mutant for mutant in value_mutants(state, 7, 200)]
    damaged += [parts | state | mutant for mutant in value_mutants({"optimizer": optimizer}, 8, 100)]
    damaged += [parts | state | {name: torch.ones(3)} for name in state]
    for number, mutant in enumerate([parts | state, *damaged]):
        write_state(path, mutant)
        refused += taken_or_named(path, resumed, lambda step, m=mutant: taken(step, m))
        if number <= 200:
            taken_or_named(path, lambda: load_backbone(path), lambda found: None)
    assert 60 < refused < 280


def test_weights_of_another_kind(tmp_path, weights):
    """Of another shape, type or layout, under other names, or none. Older files have no digest."""
    info = asdict(BackboneInfo(ARCH, features=128, resolution_px=32, data="/images", step=7))
    state = {"format": "barlow-at-speed checkpoint", "version": 1, "step": 7, "images": 1, "config": {}}
    model, path, refused = {f"backbone.{name}": w for name, w in weights.items()}, tmp_path / "checkpoint.pt", 0
    first = weights["conv1.weight"]
    others = [first.int(), first[1:], first.to_sparse(), first.to(torch.complex64), first.to("meta"), [1.0], "x", None]
    damaged = [model | {"backbone.conv1.weight": other} for other in others]
    damaged += [{7: first}, {}, None, *value_mutants(model, 9, 100)]

    def taken(found: dict[str, torch.Tensor], mutant: dict) -> None:
        assert same(found, {name.removeprefix("backbone."): w for name, w in mutant.items()})

    for mutant in [model, *damaged]:
        torch.save(state | {"backbone": info, "model": mutant}, path)
        refused += taken_or_named(path, lambda: load_backbone(path)[0].state_dict(), lambda w, m=mutant: taken(w, m))
    assert 70 < refused < 112


def test_a_detections_checkpoint(tmp_path):
    layer, path = torch.nn.Linear(3, 2), tmp_path / "checkpoint.pt"
    about = {"task": "voc", "lr": 0.1, "warmup_from": 0.5}
    training = Training(layer, Schedule(9, 1, 0.1, 0, 0.5, (), 0, 0), CPU, 0, path, about)

    def stepped() -> int:
        layer(torch.ones(1, 3)).sum().backward()
        training.optimizer.step()
        return training.iteration

    stepped()
    optimizer = copy.deepcopy(training.optimizer.state_dict())
    state = {"format": FORMAT, "version": VERSION, "about": about, "iteration": 5, "optimizer": optimizer}

    def resumed() -> int:
        training.optimizer.load_state_dict(optimizer)
        training.resume()
        return stepped()

    def taken(iteration: int, mutant: dict) -> None:
        assert iteration == mutant["iteration"] <= 9

    refused = 0
    tensors = [state | {name: torch.ones(3)} for name in state]
    for mutant in [state, *tensors, *value_mutants(state | {"model": layer.state_dict()}, 10)]:
        write_state(path, {"model": layer.state_dict()} | mutant)
        refused += taken_or_named(path, resumed, lambda done, m=mutant: taken(done, m))
    assert 100 < refused < 290


# ---- records ----

RESULT = {
    "time": "2026-01-01T00:00:00+00:00", "protocol": "semisup-bt", "metric": "top1", "value": 50.0,
    "values": {"top1": 50.0, "top1_std": 1.0}, "seconds": 1.5, "device": "cpu", "feature_type": "float32",
    "details": {"seeds": [{"seed": 0, "top1": 49.0}, {"seed": 1, "top1": 51.0}]}, "key": "", "epochs": 1000, "step": 9,
    "settings": {"norm_images": 32, "resolution_px": 224}, "changed": {}, "encoder": "trained", "arch": "resnet50",
    "dataset": "imagenet", "data": "/images", "dataset_sha256": {"train": "a", "val": "b"}, "split": "all",
    "fraction": 0.01, "train_images": 12_811, "val_images": 50_000, "classes": 1000, "seed": 0, "resolution_px": 224,
    "normalization": [[0.5] * 3, [0.2] * 3], "checkpoint": "runs/r", "checkpoint_sha256": "c" * 64,
}  # fmt: skip
METRIC = {"step": 5, "epoch": 1.0, "loss": 3.5, "images_per_s": 64.0, "lr_weights": 0.1, "lost": None}
RECORDS = {
    "config.json": as_plain(replace(TINY, run="r", data=Path("/nowhere"))),
    "env.json": {"command": "python train/pretrain.py", "world_size": 2, "device": "CPU", "cpu_cores": 2, "cuda": None},
    "metrics.jsonl": METRIC,
    "results.jsonl": RESULT,
}


def shown(folder: Path) -> list[dict]:
    """What eval/report.py says of a run, without pictures; returns the results."""
    runs = read_runs(ReportConfig((folder,)))
    (run,) = runs
    rows = newest_cells([(run.name, result) for result in run.results])
    assert summary_markdown(rows, []) and comparisons(run.results) and fact_rows(runs)
    controls_ahead(rows), other_settings(runs)
    return run.results


@pytest.mark.parametrize("name", RECORDS)
def test_a_runs_record(tmp_path, name):
    """A damaged line takes no other with it, and what is damaged is named or shown as it stands."""
    for other, content in RECORDS.items():
        (tmp_path / other).write_text(json.dumps(content) + "\n")
    before, after = (json.dumps(RECORDS[name] | {"step": step}).encode() for step in (1, 9))
    for mutant in json_mutants(json.dumps(RECORDS[name]).encode(), 11):
        lines = name.endswith(".jsonl")
        (tmp_path / name).write_bytes(b"\n".join((before, mutant, after)) if lines else mutant)
        found = outcome(lambda: shown(tmp_path))
        if isinstance(found, UserError):
            assert str(tmp_path) in str(found) and not lines
        elif name == "results.jsonl":
            kept = read_results(tmp_path)
            assert [kept[0], kept[-1]] == [with_all_settings(RESULT | {"step": step}) for step in (1, 9)]
        elif name == "metrics.jsonl":
            points = read_curves(tmp_path / name)["loss"]
            assert points[0] == points[-1] == (1.0, 3.5) and len(points) >= 2
        elif name == "config.json" and (config := read_config(tmp_path)):
            told = json.loads(mutant)
            same_flags = as_plain(config).keys() & told.keys() - {"data", "init_from"}  # as paths
            assert all(told[flag] == as_plain(config)[flag] for flag in same_flags)


def test_what_flags_may_say_is_no_damage(tmp_path):
    """A negative --seed of an evaluation; --checkpoint-every-minutes inf."""
    result = RESULT | {"seed": -1, "details": {"seeds": [{"seed": -1, "top1": 49.0}]}}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
    assert [result["seed"] for result in read_results(tmp_path)] == [-1]
    (tmp_path / "config.json").write_text(json.dumps(RECORDS["config.json"] | {"checkpoint_every_minutes": math.inf}))
    assert read_config(tmp_path).checkpoint_every_minutes == math.inf


Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(st.dictionaries(st.text(), Values, max_size=4), st.booleans(), st.floats(0, 1)), max_size=6))
def test_lines_come_back_whatever_was_torn_between_them(lines):
    """Any objects, as ASCII or not; after each, perhaps, a part of its line again, as a kill leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        path.touch()
        for value, ascii_only, part in lines:
            line = json.dumps(value, ensure_ascii=ascii_only)
            append_line(path, line, durable=False)
            with path.open("ab") as file:
                file.write(line.encode()[: int(part * (len(line) - 1))])
        assert read_lines(path) == [value for value, *_ in lines]


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"results\.jsonl cannot be read \(Is a directory\); make it readable"):
        (tmp_path / "results.jsonl").mkdir()
        read_lines(tmp_path / "results.jsonl")
