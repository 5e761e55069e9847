"""scripts/pretrain.slurm with stand-ins for SLURM's commands: what the ranks are told, and when the job is requeued."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.stopping import EXIT_REQUEUE

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "pretrain.slurm"

# Starts two tasks on each of two machines, one after the other, and returns the highest exit code, as srun does.
SRUN = """#!/bin/bash
[[ "$1" == --kill-on-bad-exit=0 ]] || exit 64
shift
worst=0
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@"
  code=$?; ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1" in
  show) [[ "$2 $3" == "hostnames node[7-8]" ]] && printf 'node7\\nnode8\\n' ;;
  requeue) echo "$2" >> requeued ;;
esac
"""
# A rank that writes down what it was told; the last one gets the exit code that the test asks for.
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> told
[[ -n "$SIGNAL" ]] && kill -s "$SIGNAL" "$SCRIPT_PID"
((RANK == 3)) && exit "$CODE"
exit "${OTHERS:-0}"
"""


def submit(folder: Path, code: int, sent: str = "", others: int = 0, *flags: str) -> subprocess.CompletedProcess:
    for name, text in (("bin/srun", SRUN), ("bin/scontrol", SCONTROL), (".venv/bin/python", PYTHON)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "30007",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "CODE": str(code),
        "OTHERS": str(others),
        "SIGNAL": sent,
    }
    command = ["bash", "-c", 'export SCRIPT_PID=$$; exec bash "$@"', "_", SCRIPT, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def requeued(folder: Path) -> list[str]:
    path = folder / "requeued"
    return path.read_text().split() if path.exists() else []


def test_what_the_ranks_are_told(tmp_path):
    done = submit(tmp_path, 0, "", 0, "--name", "a name", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    expected = [f"{r} {r % 2} 4 node7 30007 train/pretrain.py --name a name --epochs 3" for r in range(4)]
    assert (tmp_path / "told").read_text().splitlines() == expected
    assert requeued(tmp_path) == []


@pytest.mark.parametrize(("others", "sent"), [(EXIT_REQUEUE, ""), (0, ""), (EXIT_REQUEUE, "TERM"), (1, "USR1")])
def test_75_goes_back_into_the_queue(tmp_path, others, sent):
    done = submit(tmp_path, EXIT_REQUEUE, sent, others)
    assert requeued(tmp_path) == ["30007"]
    assert done.returncode == EXIT_REQUEUE and "goes back into the queue" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_had_not_yet_begun_does_too(tmp_path, number):
    """The signal ends it before Python can answer: bash and srun then say 128 and its number."""
    assert submit(tmp_path, 128 + number).returncode == 128 + number
    assert requeued(tmp_path) == ["30007"]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
def test_other_ends_do_not(tmp_path, code):
    done = submit(tmp_path, code, "TERM")
    assert requeued(tmp_path) == []
    assert done.returncode == code


def test_the_signal_leaves_time_to_write_and_is_sent_to_the_ranks():
    lines = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in lines and "--signal=USR1@300" in lines  # no "B:", which would signal the script alone
