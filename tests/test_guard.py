"""--on-nan skip leaves a lost update out without a trace, also on several ranks (test_watchdog.py starts those)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.choices.order import epoch_order
from pipeline.errors import UserError
from tests.oracles_train import SyntheticLoader
from tests.test_resume import CPU, TINY, bits, run
from train.checkpoint import read_checkpoint
from train.flags import resolved
from train.guard import MOST_IN_A_ROW, UpdateGuard


class Lossy(SyntheticLoader):
    """Two steps whose images are no numbers, 43 images in batches of 8."""

    LOST = (6, 7)

    def __init__(self):
        super().__init__(43, 8)

    def global_views(self, step):
        return [v * (float("nan") if step in self.LOST else 1) for v in super().global_views(step)]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def part(path, name: str):
    return bits(read_checkpoint(path)[name])


MOCO = {"preset": "cifar10-demo-moco_v2", "method": "moco_v2", "queue": 20}


@pytest.mark.parametrize("flags", [{}, {"amp": "fp16", "resolution": 32}, {"amp": "bf16", "resolution": 32}, MOCO])
def test_a_lost_step_leaves_no_trace(tmp_path, capsys, flags):
    folder = tmp_path / "r"
    assert run(folder, Lossy(), on_nan="skip", keep=20, checkpoint_every_steps=1, log_every=5, **flags) == 0
    before, after = folder / "checkpoint-00000006.pt", folder / "checkpoint-00000008.pt"
    assert part(before, "model") == part(after, "model")
    assert part(before, "optimizer")["state"] == part(after, "optimizer")["state"]
    assert part(before, "scaler") == part(after, "scaler")
    assert part(folder / "checkpoint-00000009.pt", "model") != part(after, "model")
    assert all(w.isfinite().all() for w in read_checkpoint(folder / "checkpoint.pt")["model"].values())
    said = capsys.readouterr().err
    assert "step 7 left out: loss nan; its 8 images" in said and "step 8 left out" in said
    ids = epoch_order(0, 1, np.arange(43))[8:16]
    assert (folder / "lost-step-7.txt").read_text().split() == [str(i) for i in ids]
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 2, 0]


def test_without_a_lost_step_skip_changes_nothing(tmp_path):
    for name in ("stop", "skip"):
        run(tmp_path / name, on_nan=name, epochs=1)
    assert part(tmp_path / "stop" / "checkpoint.pt", "model") == part(tmp_path / "skip" / "checkpoint.pt", "model")


def test_many_in_a_row_end_the_run(tmp_path):
    loader = Lossy()
    loader.LOST = range(3, 100)
    with pytest.raises(UserError, match=f"{MOST_IN_A_ROW} steps in a row, up to 13"):
        run(tmp_path / "r", loader, on_nan="skip")
    assert read_checkpoint(tmp_path / "r" / "checkpoint.pt")["step"] == 10


def test_a_lost_gradient_of_a_finite_loss(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    config = resolved(replace(TINY, run=str(tmp_path), on_nan="skip"))
    guard = UpdateGuard(model, config, CPU, ids=np.arange(43))
    guard.before_step()
    before = bits(model.state_dict())
    loss = model(torch.randn(4, 2)).sum()
    loss.backward()
    assert bits(model.state_dict()) != before  # the running statistics moved
    model[0].weight.grad[0, 1] = float("inf")
    assert not guard.keeps(loss.detach(), 0)
    assert bits(model.state_dict()) == before
    model[0].weight.grad.zero_()
    assert guard.keeps(loss.detach(), 1)
