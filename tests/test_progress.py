"""Progress in plain lines where there is no terminal, in a bar where there is one."""

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from pipeline import progress as module
from pipeline.command import REPO
from pipeline.progress import duration_text, progress, say_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only if a test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def watched(clock, total: int, seconds_each: float, **how) -> None:
    for _ in progress(range(total), "features", total, unit="batch", **how):
        clock[0] += seconds_each


def test_a_line_every_few_minutes(clock, capsys):
    watched(clock, 10, 50.0)
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "features: batch 3 of 10, 0.02 a second, 5 min 50 s left",
        "features: batch 6 of 10, 0.02 a second, 3 min 20 s left",
        "features: batch 9 of 10, 0.02 a second, 50 s left",
    ]


def test_what_is_done_soon_says_nothing(clock, capsys):
    watched(clock, 100, 1.0)
    assert capsys.readouterr().err == ""


def test_a_first_unit_that_waits_for_a_compiler_is_in_no_estimate(clock, capsys):
    bar = progress(None, "", 100, unit="step", done=10, line_every=4)
    for seconds in (500, 1, 1, 1, 1):
        clock[0] += seconds
        bar.update()
    assert capsys.readouterr().err.splitlines() == ["step 11 of 100", "step 12 of 100, 1 a second, 1 min 28 s left"]


@pytest.mark.parametrize(("name", "value"), [("TQDM_DISABLE", "1"), ("LOCAL_RANK", "1")])
def test_it_can_be_turned_off_and_only_the_first_process_shows_it(clock, capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    watched(clock, 10, 50.0, line_every=1)
    assert capsys.readouterr().err == ""
    if name == "LOCAL_RANK":  # tqdm reads its own variables when it is imported
        monkeypatch.setattr(sys, "stderr", Terminal())
        watched(clock, 10, 50.0)
        assert sys.stderr.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress(range(4), "features", 4, unit="batch"):
        say_line("a note")
    assert "\rfeatures: 100%" in sys.stderr.getvalue() and sys.stderr.getvalue().count("\ra note\n") == 4


def test_a_clock_that_stands_still_and_no_place_to_write_to(clock, capsys, monkeypatch):
    watched(clock, 10, 0.0, line_every=5)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"features: batch {n} of 10" for n in (5, 10)
    ]
    monkeypatch.setattr(sys, "stderr", None)  # as with 2>&-
    watched(clock, 10, 50.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (12, "12 s"), (60, "1 min"), (185, "3 min 5 s"), (138_000, "38 h 20 min")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


RUN = """
import sys
import termios
from pathlib import Path
from dataclasses import replace
from tests.test_resume import CPU, TINY, StoppingLoader
from train.flags import resolved
from train import pretrain, runlog
runlog.RUNS = Path(sys.argv[1]).parent
pretrain.train(resolved(replace(TINY, run=sys.argv[1])), CPU, StoppingLoader())
"""


@pytest.mark.slow
def test_a_training_logs_one_line_an_epoch(tmp_path):
    """A real training: into a pipe it writes lines, on a pseudo-terminal a bar."""
    command = [sys.executable, "-c", RUN]
    done = subprocess.run([*command, tmp_path / "pipe"], capture_output=True, cwd=REPO)
    assert done.returncode == 0 and b"\r" not in done.stderr, done.stderr.decode()
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("epoch ")]
    expected = r"epoch {0} of 3: step {1} of 15, loss [\d.]+, \d+ images/s, \d+% data wait"
    assert len(lines) == 3
    for epoch, line in enumerate(lines, 1):
        assert re.match(expected.format(epoch, 5 * epoch), line), line
    assert re.search(r", \d+ s left$", lines[1]) and "left" not in lines[2]

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    subprocess.run([*command, tmp_path / "pty"], stderr=theirs, cwd=REPO)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # Linux's end of a pseudo-terminal
            break
    os.close(ours)
    assert b"\repoch 3 of 3: 100%" in shown and b"15/15" in shown
