"""--resolution-schedule: what it may say, and a run killed around its changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from tests.evaluation import write_dataset
from tests.test_resume import CPU, TINY, Killed, end_of
from train.checkpoint import load_backbone
from train.config import PretrainConfig, resolution_rows
from train.flags import resolved
from train.pretrain import EXIT_FINISHED, train
from train.run_data import loader_config


def test_a_schedule_is_read():
    assert resolution_rows("") == ()
    assert resolution_rows("128@0,160@100,224@200") == ((0, 128), (100, 160), (200, 224))


@pytest.mark.parametrize("text", ["128", "128@1", "128@0,160@0", "128@0,160@9,192@8", "0@0", "a@0", "128@0@1"])
def test_a_schedule_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match="is not a list of px@epoch"):
        resolution_rows(text)


def test_it_ends_at_the_resolution_of_the_evaluations():
    with pytest.raises(UserError, match="ends at 192 px, --resolution says 224"):
        resolved(PretrainConfig(resolution_schedule="128@0,192@100"))


class KilledLoader:
    """The real loader, until it is to give batch `at`."""

    def __init__(self, loader, at: int):
        self.loader, self.at, self.sides = loader, at, []
        self.images, self.ids, self.steps_per_epoch = loader.images, loader.ids, loader.steps_per_epoch

    def batches(self, start, stop):
        for batch in self.loader.batches(start, stop):
            if batch.step == self.at:
                raise Killed
            self.sides.append(batch.views[0].shape[-1])
            yield batch


@pytest.mark.slow
def test_killed_before_and_after_a_change(tmp_path, monkeypatch):
    """Four steps an epoch; bitwise the weights of the run that was never killed."""
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    data = write_dataset(tmp_path / "data", train_each=13)

    def run(folder: Path, at: int = -1) -> list[int]:
        flags = {"resolution": 32, "resolution_schedule": "16@0,24@1,32@2", "checkpoint_every_steps": 3}
        config = resolved(replace(TINY, data=data, run=str(folder), global_batch=16, workers=1, **flags))
        loader = KilledLoader(make_loader(loader_config(config, CPU)), at)
        try:
            assert train(config, CPU, loader) == EXIT_FINISHED
        finally:
            loader.loader.close()
        return loader.sides

    assert run(tmp_path / "whole") == [16] * 4 + [24] * 4 + [32] * 4
    for at in (3, 4, 5, 10):
        with pytest.raises(Killed):
            run(tmp_path / "cut", at)
    assert run(tmp_path / "cut") == [32] * 3  # on from the checkpoint of step 9
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    backbone, info = load_backbone(tmp_path / "cut")
    assert info.resolution_px == 32 and torch.isfinite(backbone(torch.randn(2, 3, 32, 32))).all()
