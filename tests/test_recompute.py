"""Activations computed again, block by block: the same update, less memory, refused where not."""

import copy
from dataclasses import replace

import pytest
import torch

from pipeline.errors import UserError
from tests.test_resume import bits, end_of, run
from train.cards import PRESETS
from train.flags import resolved
from train.memory import recompute_blocks
from train.model import make_backbone


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def step_of(backbone: torch.nn.Module, images: torch.Tensor) -> dict:
    """Two passes, as for two views, and one backward pass: output, gradients and running statistics as bytes."""
    torch.manual_seed(7)
    out = backbone(images) * 2 + backbone(images.flip(0))
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters()}
    return bits({"out": out.detach(), "gradients": gradients, "state": backbone.state_dict()})


@pytest.mark.parametrize(
    ("arch", "stem", "side"),
    [("resnet18", "small", 16), ("resnet10_narrow", "imagenet", 16), ("test_resnet", "imagenet", 32)],
)
def test_the_same_bits(arch, stem, side):
    plain = make_backbone(arch, stem)[0]
    thrifty = copy.deepcopy(plain)
    recompute_blocks(thrifty)
    images = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(1))
    assert list(thrifty.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        assert step_of(plain, images) == step_of(thrifty, images)


def test_dropout_draws_the_same_again():
    plain = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))))
    thrifty = copy.deepcopy(plain)
    recompute_blocks(thrifty)
    x = torch.randn(4, 8)
    assert step_of(plain, x) == step_of(thrifty, x)


def kept_bytes(backbone: torch.nn.Module, images: torch.Tensor) -> int:
    """What the forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no memory is used twice and counted once
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = backbone(images)
    assert out.requires_grad
    return sum(found.values())


def test_less_is_kept():
    plain = make_backbone("resnet50", "small")[0]
    thrifty = copy.deepcopy(plain)
    recompute_blocks(thrifty)
    images = torch.randn(2, 3, 32, 32)
    assert kept_bytes(thrifty, images) < 0.35 * kept_bytes(plain, images)


def test_a_whole_run(tmp_path):
    run(tmp_path / "plain", epochs=2)
    run(tmp_path / "thrifty", epochs=2, activations="blocks")
    assert end_of(tmp_path / "plain") == end_of(tmp_path / "thrifty")


def test_a_network_without_stages_is_refused():
    with pytest.raises(UserError, match="finds no stages of blocks in this Linear"):
        recompute_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("recorded", ["compile", "cuda_graph"])
def test_not_with_a_recorded_network(recorded):
    with pytest.raises(UserError, match=f"--{recorded.replace('_', '-')} do not go together"):
        resolved(replace(PRESETS["cifar10"], activations="blocks", **{recorded: True}))
