"""The end of a run speaks: its encoder, what comes next, how to train longer; the commands that it names work."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from eval import extract, knn, report
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from tests.evaluation import write_dataset
from tests.test_resume import TINY
from train import pretrain
from train.checkpoint import CHECKPOINT
from train.config import PretrainConfig
from train.pretrain import EXIT_FINISHED

COMMANDS = {"knn.py": knn, "extract.py": extract, "report.py": report}
CONFIGS = {"knn.py": knn.KnnConfig, "extract.py": extract.ExtractConfig, "report.py": report.ReportConfig}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def config_of(data: Path, run: Path, **flags) -> PretrainConfig:
    return replace(TINY, data=data, run=str(run), global_batch=16, epochs=1, workers=1, resolution=32, **flags)


def trained(config: PretrainConfig, capsys) -> str:
    """What a run says that ends well."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        pretrain.main(config)
    assert end.value.code == EXIT_FINISHED
    return capsys.readouterr().err


def run_named_commands(said: str) -> list[str]:
    """Runs the commands of the last lines, by the flags that are printed; their files' names."""
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("    python ")]
    names = [Path(line[1]).name for line in lines]
    for name, line in zip(names, lines, strict=True):
        assert Path(line[1]).is_file()
        COMMANDS[name].main(tyro.cli(CONFIGS[name], args=line[2:]))
    return names


def test_a_run_with_labels(data, tmp_path, capsys, monkeypatch):
    config = config_of(data, tmp_path / "r")
    said = trained(config, capsys)
    assert f"{tmp_path}/r is finished: 12 steps in " in said and " images/s; its encoder is " in said
    assert f"{tmp_path}/r/backbone.safetensors" in said
    assert run_named_commands(said) == ["knn.py", "report.py"]
    assert (tmp_path / "r" / "results.jsonl").is_file() and (tmp_path / "r" / "report.html").is_file()

    def never(*_):
        raise AssertionError("a finished run loads no data")

    monkeypatch.setattr(pretrain, "make_loader", never)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}
    said = trained(config, capsys)
    assert said.startswith(f"{tmp_path}/r is finished already, nothing was done; to train longer, ")
    assert f"--init-from {tmp_path}/r --name r-longer" in said and "eval/knn.py --checkpoint" in said
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}

    for change in ({"epochs": 2}, {"resume": "never"}):  # another run, which is begun
        with pytest.raises(AssertionError, match="loads no data"):
            pretrain.main(replace(config, **change))
    checkpoint = (tmp_path / "r" / CHECKPOINT).read_bytes()
    (tmp_path / "r" / CHECKPOINT).write_bytes(checkpoint[:-1000])  # damaged: trained again, not called finished
    with pytest.raises(AssertionError, match="loads no data"):
        pretrain.main(config)


def test_more_epochs_are_answered_with_the_way_to_get_them(data, tmp_path, capsys):
    trained(config_of(data, tmp_path / "r"), capsys)
    with pytest.raises(UserError, match=rf"epochs 1 there, 3 here.*--init-from {tmp_path}/r --name r-longer"):
        pretrain.main(replace(config_of(data, tmp_path / "r"), epochs=3))
    with pytest.raises(UserError) as refused:
        pretrain.main(replace(config_of(data, tmp_path / "r"), seed=3))
    assert "train longer" not in str(refused.value)
    longer = config_of(data, tmp_path / "r-longer", init_from=tmp_path / "r")
    assert "begins with backbone and heads of" in trained(replace(longer, epochs=3), capsys)


@pytest.mark.parametrize("labels", ["none", "no val"])
def test_what_comes_next_where_nothing_can_be_voted(labels, imagenet_sample, tmp_path, capsys):
    if labels == "none":
        (tmp_path / "images").mkdir()
        for path in imagenet_sample[:20]:
            (tmp_path / "images" / path.name).symlink_to(path)
        convert(ConvertConfig(tmp_path / "data", tmp_path / "images", workers=1, max_side=64))
    else:
        write_dataset(tmp_path / "data", train_each=4)
        (tmp_path / "data" / "val.beton").unlink()
    said = trained(config_of(tmp_path / "data", tmp_path / "r"), capsys)
    assert run_named_commands(said) == ["extract.py", "report.py"]
    assert (tmp_path / "r" / "features.safetensors").is_file()
