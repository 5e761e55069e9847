"""--activations, --compile and --cuda-graph by device: what is counted, what is chosen, what is said.

Against the memory that steps really take: tests/test_null_cuda.py.
"""

from dataclasses import replace

import pytest
import torch

from pipeline.errors import UserError
from train import memory
from train.cards import PRESETS
from train.config import PretrainConfig
from train.distributed import Ranks
from train.flags import resolved
from train.memory import needed_bytes, saved_bytes, with_activations, with_device_defaults
from train.methods.choose import make_method
from train.model import make_backbone

CPU, GPU = (Ranks(0, 1, torch.device(kind), None) for kind in ("cpu", "cuda"))
TWO = Ranks(0, 2, torch.device("cuda"), None)
SMALL = PretrainConfig(arch="resnet18", projector="64-64", resolution=32, global_batch=16, amp="off")


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return make_method(*make_backbone("resnet18"), SMALL)


@pytest.mark.parametrize(
    ("ranks", "card", "flags", "compile", "graph"),
    [
        (CPU, "cifar10", {}, False, False),
        (CPU, "cifar10", {"activations": "half"}, True, False),
        (GPU, "cifar10", {}, True, True),
        (GPU, "cifar10-byol", {}, True, True),
        (TWO, "cifar10", {}, True, False),
        (GPU, "imagenet", {}, True, False),
        (GPU, "cifar10", {"amp": "fp16"}, True, False),
        (GPU, "cifar10", {"on_nan": "skip"}, True, False),
        (GPU, "cifar10", {"deterministic": True}, False, False),
        (GPU, "cifar10", {"activations": "blocks"}, False, False),
        (GPU, "cifar10", {"compile": False, "cuda_graph": False}, False, False),
    ],
)
def test_by_device(monkeypatch, ranks, card, flags, compile, graph):
    monkeypatch.setenv("CC", "gcc")
    config = with_device_defaults(resolved(replace(PRESETS[card], run="x", **flags)), ranks)
    assert (config.compile, config.cuda_graph) == (compile, graph)
    assert with_device_defaults(config, ranks) == config


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert with_device_defaults(SMALL, GPU).compile is False
    assert "no C compiler (gcc or clang) here, so the network is not compiled" in capsys.readouterr().err
    with pytest.raises(UserError, match="--compile: no C compiler here"):
        with_device_defaults(replace(SMALL, compile=True), GPU)


def test_all_on_a_cpu():
    assert with_activations(SMALL, small_network(), CPU).activations == "all"


def test_half_needs_the_compiler():
    with pytest.raises(UserError, match="--activations half is the compiler's work"):
        resolved(replace(SMALL, activations="half", compile=False))


def test_what_is_saved_grows_in_a_line():
    network = small_network()
    few, more, most = (saved_bytes(network, images, SMALL) for images in (4, 8, 16))
    assert most.total - more.total == pytest.approx(2 * (more.total - few.total), rel=0.01)
    assert len(few.at_blocks) == 2 * 8  # two views through eight blocks
    assert memory.at_batch(network, 16, SMALL).total == pytest.approx(most.total, rel=0.01)


def test_counting_leaves_no_trace():
    network, cpu = small_network(), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    needed = needed_bytes(network, SMALL, Ranks(0, 1, cpu, None))
    assert needed["blocks"] < needed["all"] and needed["half"] < needed["all"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_frozen_shift_is_no_target_network():
    """SimCLR's last batch norm has one; only networks without gradients hold activations that no one saves."""
    config = replace(SMALL, preset="imagenet-simclr", method="simclr", projector_norm="all")
    method = make_method(*make_backbone("resnet18"), resolved(config))
    frozen = needed_bytes(method, config, CPU)
    method.projector[-1].bias.requires_grad_(True)
    assert needed_bytes(method, config, CPU)["all"] == pytest.approx(frozen["all"], rel=1e-3)


@pytest.mark.parametrize(
    ("usable", "compile", "way", "compiled"),
    [
        (100, True, "all", True),
        (60, True, "half", True),
        (60, False, "blocks", False),
        (45, True, "blocks", False),
    ],
)
def test_the_first_way_that_fits(monkeypatch, capsys, usable, compile, way, compiled):
    monkeypatch.setattr(memory, "needed_bytes", lambda *_: {"all": 90e9, "half": 50e9, "blocks": 40e9})
    monkeypatch.setattr(memory, "free_bytes", lambda _: usable * 1e9)
    config = with_activations(replace(SMALL, compile=compile, cuda_graph=False), small_network(), GPU)
    assert (config.activations, config.compile) == (way, compiled)
    said = capsys.readouterr().err
    assert f"--activations {way}" in said and ("not compiled" in said) == (compile and not compiled)


def test_a_graph_that_is_given_up_is_told(monkeypatch, capsys):
    monkeypatch.setattr(memory, "needed_bytes", lambda *_: {"all": 90e9, "blocks": 40e9})
    monkeypatch.setattr(memory, "free_bytes", lambda _: 45e9)
    for compile, said in ((True, "so not compiled or recorded:"), (False, "so not recorded:")):
        config = with_activations(replace(SMALL, compile=compile, cuda_graph=True), small_network(), GPU)
        assert not config.compile and not config.cuda_graph
        assert said in capsys.readouterr().err


def test_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "needed_bytes", lambda *_: {"all": 90e9, "half": 50e9, "blocks": 40e9})
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20e9)
    with pytest.raises(UserError, match=r"about 40 GB .* 20 GB usable\); give a smaller --global-batch"):
        with_activations(replace(SMALL, compile=True), small_network(), GPU)
