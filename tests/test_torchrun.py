"""Runs under torchrun that lose a rank or a whole machine in the middle end with the bits of one that lost nothing.

Two machines are two network namespaces with a cable between:

    host a  10.77.0.1 (bridge) ── veth ── 10.77.0.2  host b          torchrun on each, rendezvous at host a, gloo
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from eval.detection import DetectionConfig
from eval.extract import ExtractConfig
from tests.test_resume import end_of
from train.config import PretrainConfig

REPO = Path(__file__).resolve().parents[1]
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
FLAGS = "--arch test_resnet --projector 24-16 --resolution 32 --global-batch 8 --epochs 20 --warmup-epochs 1".split()
FLAGS += "--amp off --workers 1 --log-every 3 --checkpoint-every-steps 5 --timeout-minutes 0.25".split()
LOST_AFTER_STEP, STEPS = 30, 120
PATIENCE_S = 240


def torchrun(options: list[str], run: Path, beton: Path, said: Path, *before: str, **environment) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts=3"]
    command += [str(REPO / "train" / "pretrain.py"), *FLAGS, "--data", str(beton), "--name", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | environment
    with open(said, "ab") as file:
        return subprocess.Popen(command, env=environment, stderr=file, stdout=file)


def wait_until(condition, said: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, said.read_text()[-3000:]
        time.sleep(0.05)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_beton) -> dict:
    """How a run of two ranks ends that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    process = torchrun(["--standalone", "--nproc-per-node=2"], folder / "r", small_beton, folder / "said")
    assert process.wait(PATIENCE_S) == 0, (folder / "said").read_text()
    assert last_step(folder / "r") == STEPS
    return end_of(folder / "r")


@pytest.mark.parametrize("config", [PretrainConfig, ExtractConfig, DetectionConfig])
def test_torchrun_leaves_a_commands_flags_alone(config, capsys):
    """Before Python 3.12 it takes the first letters of its own options for them: only the alias --run is such."""
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--run", "--help"}
    assert "--data" in flags
    for flag in sorted(flags):
        assert get_args_parser().parse_args(["a_script.py", flag, "1"]).training_script_args == [flag, "1"]


@pytest.mark.slow
def test_a_killed_rank_is_started_again(tmp_path, small_beton, whole):
    """The rank that is left says that it lost one, and has no traceback beside it."""
    run, said = tmp_path / "r", tmp_path / "said"
    process = torchrun(["--standalone", "--nproc-per-node=2"], run, small_beton, said)
    try:
        wait_until(lambda: last_step(run) >= LOST_AFTER_STEP, said)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        started = {int(pid) for pid in ranks if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(started) == 2
        os.kill(max(started), signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 0, said.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    text = said.read_text()
    assert "Signal 9" in text or "exitcode: -9" in text
    assert "lost the connection to another rank" in text and "Traceback (most recent" not in text
    assert end_of(run) == whole


def ip(arguments: str) -> str:
    return subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """{name: namespace}. Skips where namespaces may not be made."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2's ip")
    names = {host: f"host-{host}-{os.getpid()}" for host in ADDRESSES}
    try:
        ip(f"netns add {names['a']}")
        ip(f"-n {names['a']} link set lo up")
        ip(f"-n {names['a']} link add cable type bridge")  # host a keeps its address while host b is away
        ip(f"-n {names['a']} addr add {ADDRESSES['a']}/24 dev cable")
        ip(f"-n {names['a']} link set cable up")
        switch_on(names)
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def switch_on(names: dict[str, str]) -> None:
    """Host b, and the cable to it."""
    ip(f"netns add {names['b']}")
    ip(f"-n {names['b']} link set lo up")
    ip(f"-n {names['a']} link add port type veth peer name cable netns {names['b']}")
    ip(f"-n {names['a']} link set port master cable up")
    ip(f"-n {names['b']} addr add {ADDRESSES['b']}/24 dev cable")
    ip(f"-n {names['b']} link set cable up")


def switch_off(names: dict[str, str]) -> None:
    """Ends all that runs on host b, at once, and the host: what it still had to send is lost."""
    for pid in map(int, ip(f"netns pids {names['b']}").split()):
        os.kill(pid, signal.SIGKILL)
    ip(f"-n {names['a']} link delete port")  # with its other end
    ip(f"netns delete {names['b']}")


def on_host(host: str, names: dict[str, str], run: Path, beton: Path, said: Path) -> subprocess.Popen:
    """torchrun on a host, as a user would start it there.

    is_host: torchrun looks its own addresses up by the host's name, which in a namespace is the outer machine's.
    """
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=7", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint={ADDRESSES['a']}:29400", f"--rdzv-conf=is_host={int(host == 'a')}"]
    options += [f"--local-addr={ADDRESSES[host]}"]
    into = ["ip", "netns", "exec", names[host]]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says: the shared one outlives no lost host
    return torchrun(options, run, beton, said, *into, GLOO_SOCKET_IFNAME="cable", **own_store)


@pytest.mark.slow
def test_a_host_that_is_cut_off_and_comes_back(tmp_path, hosts, small_beton, whole):
    run, said = tmp_path / "r", {host: tmp_path / f"said-{host}" for host in hosts}
    processes = {host: on_host(host, hosts, run, small_beton, said[host]) for host in hosts}
    try:
        wait_until(lambda: last_step(run) >= LOST_AFTER_STEP, said["a"])
        ip(f"-n {hosts['b']} link set cable down")
        wait_until(lambda: "error: rank" in said["a"].read_text(), said["a"])  # host a names what it waits for
        switch_off(hosts)
        processes["b"].wait()
        switch_on(hosts)
        processes["b"] = on_host("b", hosts, run, small_beton, said["b"])
        codes = {host: process.wait(PATIENCE_S) for host, process in processes.items()}
        assert codes == {"a": 0, "b": 0}, said["a"].read_text()[-3000:] + said["b"].read_text()[-3000:]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert "no longer runs" in said["a"].read_text() or "does not answer" in said["a"].read_text()
    assert end_of(run) == whole
