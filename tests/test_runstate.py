"""Checkpoints written beside the training: when, how many, in the background, damaged ones passed over, errors told."""

import os
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train.runstate
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.storage.shards import open_stored
from tests.evaluation import write_split
from tests.oracles_train import SyntheticLoader
from tests.test_resume import CPU, STEPS, TINY, Killed, StoppingLoader, bits, end_of, run
from train import pretrain
from train.checkpoint import earlier_checkpoints, load_backbone, newest_checkpoint, read_checkpoint, save_checkpoint
from train.config import as_plain
from train.flags import resolved
from train.run_data import dataset_sha256
from train.runstate import RunState, checkpoint_bytes, on_cpu
from train.update import make_update


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def state_of(folder, **flags) -> tuple[RunState, torch.nn.Module]:
    """The state of a run whose whole model is one layer."""
    folder.mkdir(exist_ok=True)
    model = torch.nn.Linear(4, 3)
    config = resolved(replace(TINY, run=str(folder), **flags))
    loader = StoppingLoader()
    about = {"steps_per_epoch": loader.steps_per_epoch, "stop_step": config.epochs * loader.steps_per_epoch}
    update = SimpleNamespace(config=config, ranks=CPU, state={"model": model}, features=3, **about)
    return RunState(update, loader.images), model


def steps(folder) -> list[int]:
    """Of checkpoint.pt and those before it, the newest first."""
    return [read_checkpoint(path)["step"] for path in (folder / "checkpoint.pt", *earlier_checkpoints(folder))]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [15]),
        ({"checkpoint_every_steps": 4}, [4, 8, 12, 15]),
        ({"checkpoint_every_minutes": 1e-9}, list(range(1, 16))),
    ],
)
def test_when_a_checkpoint_is_due(tmp_path, flags, expected):
    state, _ = state_of(tmp_path, **{"checkpoint_every_minutes": 0, "checkpoint_every_steps": 0} | flags)
    assert [step for step in range(1, STEPS + 1) if state.due(step)] == expected


def test_an_epoch_ends_with_a_checkpoint_where_the_last_is_a_minute_old(tmp_path):
    state, _ = state_of(tmp_path, checkpoint_every_minutes=0, checkpoint_every_steps=0)
    state.since -= 61
    assert [step for step in range(1, STEPS + 1) if state.due(step)] == [5, 10, 15]
    state.save(5)
    assert not state.due(10)
    state.finish()


def test_the_clock_starts_anew_with_every_checkpoint(tmp_path):
    state, _ = state_of(tmp_path, checkpoint_every_minutes=0.2 / 60)
    assert not state.due(1)
    time.sleep(0.2)
    assert state.due(2)
    state.save(2)
    assert not state.due(3)
    state.finish()


@pytest.mark.parametrize(("keep", "expected"), [(1, [15]), (2, [15, 12]), (4, [15, 12, 9, 6])])
def test_the_last_ones_stay(tmp_path, keep, expected):
    run(tmp_path / "r", checkpoint_every_steps=3, keep=keep)
    assert steps(tmp_path / "r") == expected
    assert [path.name for path in earlier_checkpoints(tmp_path / "r")] == [
        f"checkpoint-{s:08d}.pt" for s in expected[1:]
    ]


def test_starting_over_removes_those_of_the_run_before(tmp_path):
    run(tmp_path / "r", keep=3)
    with pytest.raises(Killed):
        run(tmp_path / "r", StoppingLoader(6), keep=3, resume="never")
    assert steps(tmp_path / "r") == [5] and not (tmp_path / "r" / "backbone.safetensors").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_newest_one_is_passed_over(tmp_path, capsys, share):
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", StoppingLoader(12))
    newest = tmp_path / "cut" / "checkpoint.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(share * len(whole))])
    capsys.readouterr()
    assert run(tmp_path / "cut") == 0
    said = capsys.readouterr().err
    assert "checkpoint.pt is damaged or missing; continuing from checkpoint-00000005.pt" in said
    assert "steps 5 to 15" in said
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert steps(tmp_path / "cut") == [15, 10]


def test_killed_between_the_two_renames(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", StoppingLoader(12))
    os.replace(tmp_path / "cut" / "checkpoint.pt", tmp_path / "cut" / "checkpoint-00000010.pt")
    for name in ("checkpoint.pt", "backbone.safetensors"):
        (tmp_path / "cut" / f".{name}.123.tmp").write_bytes(b"half")
    assert run(tmp_path / "cut") == 0
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*"))


def test_nothing_but_damaged_ones_is_an_error(tmp_path):
    run(tmp_path / "r", epochs=1)
    for path in (tmp_path / "r").glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read"):
        run(tmp_path / "r", epochs=1)


def test_another_version_is_refused_though_an_older_one_could_be_read(tmp_path):
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2, "version": 99}, before=1, keep=2)
    with pytest.raises(UserError, match="version 99"):
        newest_checkpoint(tmp_path)


def test_what_is_written_is_the_moment_of_the_call(tmp_path, monkeypatch):
    """Training goes on while the disk is slow; a second checkpoint waits for the first."""
    disk, writing, most = threading.Event(), [], []

    def slow(folder, content, **rest):
        writing.append(content["step"])
        most.append(len(writing))
        disk.wait(10)
        save_checkpoint(folder, content, **rest)
        writing.remove(content["step"])

    monkeypatch.setattr(train.runstate, "save_checkpoint", slow)
    state, model = state_of(tmp_path, keep=5)
    before = bits(on_cpu(model.state_dict()))
    state.save(1)
    with torch.no_grad():
        model.weight += 1
    assert not list(tmp_path.iterdir())  # save came back before anything was written
    threading.Timer(0.1, disk.set).start()
    state.save(2)
    state.finish()
    assert most == [1, 1]
    assert steps(tmp_path) == [2, 1]
    assert bits(read_checkpoint(tmp_path / "checkpoint-00000001.pt")["model"]) == before
    assert bits(read_checkpoint(tmp_path / "checkpoint.pt")["model"]) == bits(model.state_dict())


def test_the_signals_checkpoint_is_there_when_the_run_ends(tmp_path, monkeypatch):
    def slow(*arguments, **keywords):
        time.sleep(0.1)
        save_checkpoint(*arguments, **keywords)

    monkeypatch.setattr(train.runstate, "save_checkpoint", slow)
    assert run(tmp_path / "r", StoppingLoader(6, signal.SIGTERM), checkpoint_every_steps=1) == 75
    assert steps(tmp_path / "r") == [7, 6]


@pytest.mark.parametrize("flags", [{}, {"arch": "resnet10_narrow", "projector": "64-64"}, {"method": "byol"}])
def test_the_room_that_is_asked_for_is_that_of_a_checkpoint(tmp_path, flags):
    """Counted before the first step, held against the file after the last; BYOL's target has no momentum."""
    byol = {"preset": "cifar10-demo-byol", "predictor": "24-16"} if "method" in flags else {}
    config = resolved(replace(TINY, run=str(tmp_path / "r"), epochs=1, **flags, **byol))
    counted = checkpoint_bytes(make_update(config, CPU, steps_per_epoch=5).method)
    assert pretrain.train(config, CPU, StoppingLoader()) == 0
    written = (tmp_path / "r" / "checkpoint.pt").stat().st_size
    assert written < counted < 1.05 * written + 200_000


class FullDisk(SyntheticLoader):
    """From batch 7 on no file may grow beyond 1 kB."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if batch.step > 7:
                time.sleep(0.05)
            self.last = batch.step
            yield batch


def test_a_disk_that_fills_up_ends_the_run_within_a_step_or_two(tmp_path):
    """TensorBoard's thread, which meets the same disk, says nothing of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    loader = FullDisk(43, 8)
    try:
        with pytest.raises(UserError, match=r"could not write .*the one before it is untouched"):
            run(tmp_path / "r", loader, checkpoint_every_steps=4, log_every=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loader.last < STEPS - 1
    assert steps(tmp_path / "r") == [4]


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    state, model = state_of(tmp_path)
    state.save(1)
    state.finish()
    with torch.no_grad():
        model.bias[1] = float("inf")
    state.save(2)
    with pytest.raises(UserError, match="bias is no longer finite after step 2"):
        state.finish()
    assert steps(tmp_path) == [1]


def test_a_fault_of_ours_in_the_thread_is_not_lost(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(train.runstate, "save_checkpoint", broken)
    state, _ = state_of(tmp_path)
    state.save(1)
    with pytest.raises(ZeroDivisionError):
        state.finish()


def test_flags_of_checkpoints_are_no_part_of_the_recipe(tmp_path):
    run(tmp_path / "r", epochs=1)
    chosen = {"compile": False, "cuda_graph": False, "views_together": False, "activations": "all"}  # on a CPU
    before = as_plain(resolved(replace(TINY, run=str(tmp_path / "r"), epochs=1, **chosen)))
    assert run(tmp_path / "r", epochs=1, keep=7, checkpoint_every_steps=3, checkpoint_every_minutes=1.0) == 0
    assert read_checkpoint(tmp_path / "r" / "checkpoint.pt")["config"] == before


def test_a_run_that_another_process_took_over_writes_no_more(tmp_path):
    """It stood still for so long that another one took it for dead."""
    writer = OneWriter(tmp_path / ".writer", "the run r")
    state, _ = state_of(tmp_path)
    state.writer = writer
    state.save(1)
    state.finish()
    writer.lost = True
    assert state.failed, "the step that is under way is the last"
    state.save(2)
    with pytest.raises(UserError, match="another process took over the run r"):
        state.finish()
    assert steps(tmp_path) == [1]


def test_a_run_resumes_on_its_own_images_alone(tmp_path, capsys):
    """The digest decides: other pixels under the same names are others, the same ones elsewhere are not."""
    labels = np.arange(16) % 2
    for name, seed in (("own", 1), ("other", 2)):
        write_split(tmp_path / name / "train.beton", labels, ["a", "b"], seed)
    shutil.copytree(tmp_path / "own", tmp_path / "moved")

    def trained(data: str, folder: str = "r", epochs: int = 2) -> int:
        config = replace(
            TINY, data=tmp_path / data, run=str(tmp_path / folder), global_batch=8, epochs=epochs, workers=1
        )
        with pytest.raises(SystemExit) as end:
            pretrain.main(config)
        return end.value.code

    assert trained("own", epochs=2) == 0
    digests = {name: dataset_sha256(open_stored(tmp_path / name / "train.beton")) for name in ("own", "other", "moved")}
    assert digests["own"] == digests["moved"] != digests["other"]
    assert load_backbone(tmp_path / "r")[1].dataset_sha256 == digests["own"]
    assert load_backbone(tmp_path / "r" / "backbone.safetensors")[1].dataset_sha256 == digests["own"]
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError) as refused:
        pretrain.main(
            replace(TINY, data=tmp_path / "other", run=str(tmp_path / "r"), global_batch=8, epochs=2, workers=1)
        )
    for part in (f"/own (digest {digests['own'][:12]})", f"/other holds other ones (digest {digests['other'][:12]})"):
        assert part in str(refused.value)
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    assert trained("moved") == 0
    assert "it is taken on trust" not in capsys.readouterr().err
    state = read_checkpoint(tmp_path / "r" / "checkpoint.pt")
    del state["backbone"]["dataset_sha256"]  # as it was before
    save_checkpoint(tmp_path / "r", state)
    assert trained("own") == 0
    assert "is from before checkpoints named their images; it is taken on trust" in capsys.readouterr().err
