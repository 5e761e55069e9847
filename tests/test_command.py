"""How a command ends: a user's mistake and what the system refuses are a sentence, a fault of ours is a traceback."""

import errno
import subprocess
import sys
from dataclasses import dataclass

import pytest

from pipeline.command import run_command
from pipeline.errors import UserError
from tests.support import REPO


@dataclass(frozen=True)
class Config:
    """A command without flags."""


def command(monkeypatch, error: BaseException) -> None:
    def main(_: Config) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    run_command(Config, main)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("found, expected; do"), "error: found, expected; do\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "/a/b"),
            "error: /a/b could not be used (Read-only file system); make room, ",
        ),
        (OSError(errno.EMFILE, "Too many"), "error: a file of this command could not be used (Too many); make room, "),
        (MemoryError(), "error: memory was too short for this command; end other programs, "),
    ],
)
def test_a_sentence(monkeypatch, capsys, error, said):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, error)
    assert end.value.code == 2
    assert (text := capsys.readouterr().err).startswith(said) and text.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        BrokenPipeError(errno.EPIPE, "x"),
        ValueError(),
        KeyError("x"),
    ],
)
def test_a_fault_of_ours(monkeypatch, error):
    with pytest.raises(type(error)):
        command(monkeypatch, error)


def test_a_pipe_that_nobody_reads_any_more():
    """The command's end is quiet, and it is told apart from a mistake."""
    code = "from pipeline.command import run_command; from tests.test_command import Config; "
    code += "run_command(Config, lambda _: print('x' * 1_000_000, flush=True))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
