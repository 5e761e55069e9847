"""The run's record: lines, their means, what a resumed run keeps, the picture, and a lost loss."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.choices.order import epoch_order
from pipeline.errors import UserError
from train.config import PretrainConfig, as_plain
from train.curves import plot_loss
from train.distributed import Ranks
from train.runlog import RunLog, describe_run, installed_version, keep_lines_before, open_run_folder
from train.sinks import grouped

CPU = Ranks(0, 1, torch.device("cpu"), None)
IMAGES = 40
IDS = np.arange(IMAGES)


def run_log(folder, ranks=CPU, stop_step=8, start_step=0, **flags) -> RunLog:
    """Of a run of four steps an epoch."""
    config = PretrainConfig(run=str(folder), **{"global_batch": 10} | flags)
    update = SimpleNamespace(config=config, ranks=ranks, stop_step=stop_step, steps_per_epoch=4)
    return RunLog(update, ids=IDS, start_step=start_step)


def metrics(loss: float) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(v) for n, v in {"loss": loss, "diagonal_mean": 0.5, "off_diagonal_rms": 0.1}.items()}


def lines(folder) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_means_over_their_steps(tmp_path):
    log = run_log(tmp_path, log_every=3)
    for step in range(8):
        log.record(step, metrics(float(step)), {"weights": 0.1 * step, "biases": 0.0}, waited_s=0.0)
    log.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 8]
    assert [line["epoch"] for line in found] == [0.75, 1.5, 2.0]
    assert [line["loss"] for line in found] == [1.0, 4.0, 6.5]
    assert found[1]["lr_weights"] == pytest.approx(0.5)
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait_share"] <= 1 for line in found)
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_epoch_has_a_line_of_its_own_loss(tmp_path, capsys):
    log = run_log(tmp_path, log_every=20)
    for step in range(8):
        log.record(step, metrics(float(step)), {})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(4, 1.5), (8, 5.5)]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [line.split(", ")[1] for line in said] == ["loss 1.5", "loss 5.5"]


def test_a_resumed_run_keeps_only_what_it_does_not_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    keep_lines_before(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    others = '{"note": "été", "loss": null}\n{"step": null}\n'
    path.write_text(
        others + '{"step": 2, "loss": 0.1}\n{"st{"step": 3}\n17\n{"step": 4}\n{"step": 5}\n', encoding="utf-8"
    )
    keep_lines_before(path, 4)
    assert (
        path.read_text()
        == r'{"note": "\u00e9t\u00e9", "loss": null}' + '\n{"step": null}\n{"step": 2, "loss": 0.1}\n{"step": 4}\n'
    )


def test_weights_and_biases_gets_the_same_lines(tmp_path, monkeypatch):
    """A stand-in for the package: what it is told, by rank 0 alone."""
    told = []

    class Run:
        def log(self, line, step):
            told.append((step, line))

        def finish(self):
            told.append("finished")

    def init(**about):
        told.append(about)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tmp_path / "r").mkdir()
    log = run_log(tmp_path / "r", log_every=2, stop_step=2, wandb="project")
    for step in range(2):
        log.record(step, metrics(1.0), {})
    log.flush()
    log.close()
    about, line, end = told
    assert (about["project"], about["id"], about["resume"]) == ("project", "r", "allow")
    (written,) = lines(tmp_path / "r")
    assert line == (2, grouped(written) | {"epoch": 0.5}) and end == "finished"
    run_log(tmp_path / "other", Ranks(1, 2, torch.device("cpu"), None), wandb="project").close()
    assert len(told) == 3


def test_charts_come_in_groups(tmp_path):
    """What TensorBoard itself reads back: no step and epoch among the numbers, and every number of a line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_log(tmp_path, log_every=2, stop_step=2)
    collapse = {"embedding_spread": torch.tensor(1.0), "effective_dimensions": torch.tensor(9.0)}
    for step in range(2):
        log.record(step, metrics(3.0) | collapse | {"on_diagonal": torch.tensor(1.0)}, {"weights": 0.1, "biases": 0.2})
    log.note_accuracy(2, {"knn_top1": 40.0, "linear_top1": 41.0, "knn_images": 10})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/loss", "loss/on_diagonal", "collapse/diagonal_mean", "collapse/off_diagonal_rms",
        "collapse/embedding_spread", "collapse/effective_dimensions", "speed/images_per_s", "speed/data_wait_share",
        "lr/weights", "lr/biases", "knn/knn_top1", "knn/linear_top1", "knn/knn_images",
    }  # fmt: skip
    assert [(point.step, point.value) for point in events.Scalars("loss/loss")] == [(2, 3.0)]

    log = run_log(tmp_path, log_every=2, stop_step=4, start_step=2)
    for step in (2, 3):
        log.record(step, metrics(5.0), {})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss/loss")] == [(2, 3.0), (4, 5.0)]


def test_a_disk_that_takes_no_tensorboard_file_ends_no_run(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()
    log = run_log(tmp_path, log_every=2)
    for step in range(4):
        log.record(step, metrics(1.0), {})
    log.close()
    assert len(lines(tmp_path)) == 2
    assert capsys.readouterr().err.count("note: nothing more for TensorBoard (File exists)") == 1


def test_a_collapse_is_named_once(tmp_path, capsys):
    log = run_log(tmp_path, log_every=2)
    for step in range(8):
        spread = {"embedding_spread": torch.tensor(1.0 if step < 2 else 0.02)}
        log.record(step, metrics(1.0) | spread, {})
        assert ("the embeddings collapse" in capsys.readouterr().err) == (step == 3)
    log.close()


def test_pictures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_log(tmp_path)
    views = tuple(torch.randn(3, 3, 6, 5, generator=torch.Generator().manual_seed(v)) for v in range(2))
    corner = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    log.pictures(4, views, SimpleNamespace(pictures=lambda: {"cross_correlation": corner}))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (shown,), (matrix,) = (events.Images(name) for name in ("views", "cross_correlation"))
    assert (shown.step, shown.width, shown.height) == (4, 15, 12)
    pixels = np.asarray(Image.open(io.BytesIO(matrix.encoded_image_string)))
    assert pixels.tolist() == [[[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [255, 127, 127]]]


def test_other_ranks_write_nothing(tmp_path):
    log = run_log(tmp_path, Ranks(1, 2, torch.device("cpu"), None), log_every=1)
    log.record(0, metrics(1.0), {})
    log.before_checkpoint()
    log.pictures(4, (torch.zeros(1, 3, 2, 2),), SimpleNamespace(pictures=dict))
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_lost_loss_names_its_step_and_images(tmp_path):
    log = run_log(tmp_path, log_every=4)
    for step, loss in enumerate([1.0, 2.0, float("nan")]):
        log.record(step, metrics(loss), {})
    with pytest.raises(UserError, match=r"the loss became nan in step 3; its 10 images, \d+, .* listed in"):
        log.record(3, metrics(4.0), {})
    log.close()
    expected = epoch_order(0, 0, IDS)[20:30]
    assert (tmp_path / "lost-step-3.txt").read_text().split() == [str(i) for i in expected]


def test_a_loss_lost_between_two_lines_stops_the_checkpoint(tmp_path):
    log = run_log(tmp_path, log_every=10)
    log.record(0, metrics(1.0), {})
    log.before_checkpoint()
    log.record(1, metrics(float("inf")), {})
    with pytest.raises(UserError, match="the loss became inf in step 2"):
        log.before_checkpoint()
    log.close()


def test_skipped_steps_are_counted_and_not_averaged(tmp_path):
    log = run_log(tmp_path, log_every=2, on_nan="skip")
    kept = [True, False, False, False, True, True, True, False]
    for step, keep in enumerate(kept):
        log.record(step, metrics(float(step)) if keep else None, {})
    log.close()
    found = [(line["step"], line["loss"], line["skipped_steps"]) for line in lines(tmp_path)]
    assert found == [(2, 0.0, 1), (6, 4.5, 0), (8, 6.0, 1)]


def test_description_and_latest(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path / "runs")
    monkeypatch.setattr("sys.argv", ["train/pretrain.py", "--name", "a b"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("a", "b"):
        folder = tmp_path / "runs" / name
        open_run_folder(folder)
        describe_run(folder, as_plain(PretrainConfig()), CPU, start_step=5)
        assert (tmp_path / "runs" / "latest").resolve() == folder
    assert not (tmp_path / "runs" / "latest").readlink().is_absolute()
    outside = tmp_path / "outside"
    open_run_folder(outside)
    describe_run(outside, as_plain(PretrainConfig()), CPU, start_step=5)
    assert (tmp_path / "runs" / "latest").resolve() == outside
    assert json.loads((folder / "config.json").read_text()) == as_plain(PretrainConfig())
    env = json.loads((folder / "env.json").read_text())
    assert env["command"] == "torchrun --nproc-per-node=2 train/pretrain.py --name 'a b'"
    assert env["start_step"] == 5 and env["torch"] == torch.__version__.split("+")[0]


def test_an_impossible_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--name"):
        open_run_folder(tmp_path / "file" / "run")


def test_picture(tmp_path):
    """A curve for each number that some line has; what is null, torn or without an epoch is left out."""
    values = {"loss": 1.0, "diagonal_mean": 0.5, "off_diagonal_rms": 0.1}
    full = [{"step": s, "epoch": s / 2, **values} for s in range(3)]
    holes = [
        {"step": 1, "epoch": 0.5, "knn_top1": 9.0},
        {"note": "x"},
        {"step": 2, "epoch": 1.0, "loss": None},
        *full[2:],
    ]
    widths = []
    for lines in (full, holes, [{"epoch": 0.5, "loss": 2.0}], [{"epoch": 1.0, "loss": None}], []):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epo')
        (tmp_path / "loss.png").unlink(missing_ok=True)
        plot_loss(tmp_path / "metrics.jsonl")
        png = (tmp_path / "loss.png").read_bytes() if (tmp_path / "loss.png").exists() else None
        widths.append(png and Image.open(io.BytesIO(png)).width // 440)
    assert widths == [3, 4, 1, None, None]


def test_a_package_that_is_missing_ends_no_run():
    """A machine without FFCV trains all the same."""
    assert installed_version("torch") and installed_version("no-such-package") is None
