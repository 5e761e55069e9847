"""One process needs no process group, and its signals are its own; several ranks are in test_world_size.py."""

import os
import signal

import pytest
import torch
import torch.distributed

from train.distributed import Ranks, StopRequest, largest, say, start_ranks, stop_ranks, sum_over_ranks, world_size

CPU = Ranks(0, 1, torch.device("cpu"), None)


def test_a_single_process_starts_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.control) == (0, 1, None)
    assert world_size() == 1 and not torch.distributed.is_initialized()
    x = torch.ones(3)
    assert sum_over_ranks(x) is x
    assert largest(ranks, -5) == -5
    stop_ranks()


def test_one_process_under_torchrun_starts_nothing_either(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert start_ranks().world_size == 1
    assert not torch.distributed.is_initialized()


def test_a_signal_becomes_a_wish_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest(CPU) as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_first_signal_is_answered_and_a_second_interrupt_ends(capfd):
    with StopRequest(CPU):
        os.kill(os.getpid(), signal.SIGINT)
        assert "SIGINT: the step under way ends, then a checkpoint is written; another Ctrl-C" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopRequest(CPU._replace(rank=1)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_only_rank_0_speaks(capsys):
    say(CPU, "hello")
    say(CPU._replace(rank=1), "not me")
    assert capsys.readouterr().err == "hello\n"
