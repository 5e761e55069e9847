"""A step reads no number back from the device, which would make the host wait for it and break a CUDA graph.

The whole step runs on `meta` tensors: they have shapes and no values, so whatever asks for one fails.
"""

import contextlib
from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.test_ablations import ABLATIONS
from train.cards import PRESETS
from train.config import METHOD_NAMES, EmbeddingNorm, Loss
from train.flags import resolved
from train.lars import LARS, gradient_norm
from train.methods.choose import make_method
from train.methods.contract import keep_views_apart
from train.model import make_backbone
from train.online_linear import OnlineLinear

CASES = {name: {"preset": "cifar10" + ("" if name == "barlow_twins" else f"-{name}")} for name in METHOD_NAMES}
CASES |= ABLATIONS | {
    "predictor": {"predictor": "512-2048"},
    "asymmetric": {"predictor": "64-2048", "stop_gradient": True},
}
CASES |= {f"{name} together": CASES[name] | {"views_together": True} for name in METHOD_NAMES}


def test_every_ablation_is_here():
    assert {flags.get("loss", "barlow-twins") for flags in CASES.values()} == set(get_args(Loss))
    assert {flags.get("embedding_norm", "batch") for flags in CASES.values()} == set(get_args(EmbeddingNorm))


@pytest.mark.parametrize("name", CASES)
def test_a_step_without_values(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta device
    flags = CASES[name]
    config = resolved(replace(PRESETS[flags.get("preset", "cifar10")], run="x", **flags))
    with torch.device("meta"):
        method = make_method(*make_backbone(config.arch, config.stem), config)
    linear = OnlineLinear(512, 10, config, adapt=True, device=torch.device("meta"))
    method = method.to(memory_format=torch.channels_last)
    if config.views_together:
        keep_views_apart(method)
    optimizer = LARS(method.parameter_groups(), eta=config.lars_eta, clip=config.lars_clip)
    views = [torch.empty(8, 3, 32, 32, device="meta").contiguous(memory_format=torch.channels_last) for _ in range(2)]
    for step in range(2):
        optimizer.send_rates()  # as a recorded step has them
        loss, metrics = method(views)
        loss.backward()
        metrics["gradient_norm"] = gradient_norm(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, 9)
        linear.step(method.features, torch.empty(8, dtype=torch.int64, device="meta"), 0.5)
    assert {value.device.type for value in metrics.values()} == {"meta"}


def test_a_number_that_is_read_would_show():
    """Boolean indexing, which the ablations once did, and a value."""
    c = torch.empty(4, 4, device="meta")
    for read in (lambda: c[c > 0].sum(), lambda: c.sum().item(), lambda: bool(c.sum() > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
