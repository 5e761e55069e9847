"""A signal before there is a step: during the imports, and while the ranks wait for each other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.stopping import EXIT_INTERRUPTED, EXIT_REQUEUE, STOP_SIGNALS
from tests.support import REPO

FORKS = """
import os, signal, time
from pipeline.stopping import end_at_signals
end_at_signals()
if not (child := os.fork()):
    time.sleep(60)
time.sleep(0.5)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.2)
print("lives")
"""
PRETRAIN = REPO / "train" / "pretrain.py"


def start(**environment) -> subprocess.Popen:
    command = [sys.executable, str(PRETRAIN), "--preset", "cifar10-demo"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def end_of(process: subprocess.Popen, number: int) -> tuple[int, str]:
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, said


def wait_until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def handles(process: subprocess.Popen, number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_during_the_imports(number):
    process = start()
    wait_until(lambda: handles(process, STOP_SIGNALS[-1]), process)
    code, said = end_of(process, number)
    assert code == (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE)
    (line,) = said.strip().splitlines()
    assert line.startswith(f"{signal.Signals(number).name}: no step was under way, nothing is lost; ")


def test_a_signal_to_a_forked_child_is_the_childs():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{-signal.SIGTERM}\nlives\n", "")


@pytest.mark.slow
def test_while_the_ranks_wait_for_each_other():
    """The main thread is inside PyTorch then, and would run no handler for half an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tables = [Path(f"/proc/{process.pid}/net/{table}") for table in ("tcp", "tcp6")]
    wait_until(lambda: any(f":{port:04X} " in table.read_text() for table in tables), process)
    time.sleep(0.2)
    code, said = end_of(process, signal.SIGTERM)
    assert code == EXIT_REQUEUE and "Traceback" not in said
