"""What a step costs on a CPU: counted without a step, held against one that runs."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.test_resume import CPU, TINY, bits
from train import cpu_cost
from train.cpu_cost import operations_per_s, say_cost, step_cost
from train.flags import resolved
from train.memory import saved_bytes
from train.update import make_update

CARD = {"arch": "resnet18", "projector": "128-128", "resolution": 64, "global_batch": 6}


def update_of(tmp_path, **flags):
    return make_update(resolved(replace(TINY, run=str(tmp_path / "r"), **CARD | flags)), CPU)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_count_is_that_of_a_pass_that_runs(tmp_path, amp):
    update = update_of(tmp_path, amp=amp)
    before, state = bits(update.method.state_dict()), torch.get_rng_state()
    counted, operations = step_cost(update)
    assert bits(update.method.state_dict()) == before and torch.equal(state, torch.get_rng_state())
    assert not any(isinstance(t, FakeTensor) for t in (*update.method.parameters(), *update.method.buffers()))
    weights, views = sum(p.nbytes for p in update.method.parameters()), 4 * 2 * 6 * 3 * 64 * 64 * 4
    ran = 3 * weights + views + saved_bytes(update.method, 6, update.config).total
    assert counted == pytest.approx(ran, rel=0.02)
    # ResNet-18 has 1.82 GFLOP (multiplications and additions) × 2 at 224 px; here two views of 6 images at 64 px.
    assert operations == pytest.approx(3 * 2 * 6 * 2 * 1.82e9 * (64 / 224) ** 2, rel=0.05)


def test_a_type_that_this_cpu_is_slow_with_is_named(tmp_path, capsys, monkeypatch):
    speeds = {torch.float32: 215e15, torch.bfloat16: 1e15}
    monkeypatch.setattr(cpu_cost, "operations_per_s", speeds.__getitem__)
    say_cost(update_of(tmp_path, amp="bf16"))
    said = capsys.readouterr().err
    words = "a convolution in bf16 takes 215 × as long as in float32; --amp off makes steps faster"
    assert said == f"note: on this CPU {words}\n"
    say_cost(update_of(tmp_path, amp="off"))
    speeds[torch.bfloat16] = 200e15  # as fast, measured twice
    say_cost(update_of(tmp_path, amp="bf16"))
    assert capsys.readouterr().err == ""


def test_it_is_said_where_it_is_much_and_only_there(tmp_path, capsys, monkeypatch):
    assert operations_per_s(torch.float32) > 1e8
    update = update_of(tmp_path)
    monkeypatch.setattr(cpu_cost, "operations_per_s", lambda dtype: 1e15)
    say_cost(update)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cpu_cost, "operations_per_s", lambda dtype: 1e8)
    say_cost(update)
    said = capsys.readouterr().err
    assert "a step of 6 images with resnet18 takes about " in said and " min" in said and "may end it" not in said
    monkeypatch.setattr(cpu_cost, "free_bytes", lambda device: 1e6)
    say_cost(update)
    assert " GB (0.001 GB are free, so the system may end it); it is made for a GPU" in capsys.readouterr().err
    say_cost(update_of(tmp_path, arch="test_resnet"))
    assert capsys.readouterr().err == ""
