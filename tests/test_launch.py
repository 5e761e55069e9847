"""What a launcher may have told a process wrongly, and ranks that do not find each other: a sentence that names it."""

import socket

import pytest

from pipeline.errors import UserError
from train.distributed import start_ranks
from train.launch import own_gpu

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ends(monkeypatch, minutes: float = 0.02, **environment) -> str:
    """The sentence with which a process ends that has these variables alone."""
    for name in (*TWO, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        start_ranks(minutes)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"RANK": None}, "RANK is not set; expected a whole number from 0 to 1, as WORLD_SIZE is 2; torchrun"),
        ({"RANK": "2"}, "RANK is '2'; expected a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1", "WORLD_SIZE": None}, "RANK is '1'; expected a whole number from 0 to 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; expected a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is not set"),
    ],
)
def test_a_variable_is_named(monkeypatch, changed, expected):
    assert ends(monkeypatch, **TWO | changed).startswith(expected)


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(
        UserError, match="LOCAL_RANK is '8'; expected a whole number from 0 to 7, as PyTorch sees 8 GPUs"
    ):
        own_gpu(8)
    monkeypatch.delenv("LOCAL_RANK")
    assert own_gpu(1) == 0


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = ends(monkeypatch, **TWO | {"RANK": "0", "MASTER_PORT": port})
    assert said.startswith(f"MASTER_PORT {port} is in use on this machine")


@pytest.mark.parametrize(
    ("changed", "rank"),
    [({"RANK": "0"}, 0), ({"RANK": "1", "MASTER_ADDR": "no-such-machine.invalid"}, 1)],
)
def test_ranks_that_do_not_come(monkeypatch, capsys, free_port, changed, rank):
    """After a while it is said that they are waited for; after the limit it ends."""
    monkeypatch.setattr("train.launch.WAIT_SAID_S", 0.3)
    said = ends(monkeypatch, **TWO | {"MASTER_PORT": str(free_port)} | changed)
    assert said.startswith(f"rank {rank} of 2 did not find the others at MASTER_ADDR=")
    assert f"MASTER_PORT={free_port} (" in said and "the limit was 0.02 minutes" in said
    assert f"note: rank {rank} of 2 still waits for the others at MASTER_ADDR=" in capsys.readouterr().err
