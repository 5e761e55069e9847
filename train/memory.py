"""What a step keeps for its backward pass (--activations), chosen so that the run fits its GPU.

    all      everything: the fastest
    half     a compiled network that keeps half of it and computes the rest again (the compiler chooses what)
    blocks   each residual or transformer block's input alone; not compiled, a third more work. Every bit of the update
             stays: dropout draws the same masks again, and batch norm's running statistics move once

auto takes the first of them that fits. How much each needs is not known from a table but counted: a forward pass of
two small batches through a copy of the network shows what autograd saves, which grows linearly with the batch.

    all      weights, gradients, momentum + views in the making + what autograd saves
    half     the same with half of what grows with the batch
    blocks   the same with what is saved then, and at the worst moment the inside of one block as well

The counts are held against the memory that steps really took in tests/test_null_cuda.py and results/README.md.
"""

import contextlib
import copy
import gc
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.choices.order import rank_batch
from pipeline.errors import UserError
from train.config import AMP, Activations, PretrainConfig, resolution_rows
from train.distributed import Ranks, largest, say
from train.methods.contract import Method
from train.run_data import view_type

GB = 1e9
PROBES = 4, 8  # images of the two batches that are counted
BATCHES_OF_VIEWS = 4  # the one in use, those that the loader has ready, and the decoded pixels of one in the making
HALF = 0.5  # what the compiler may keep, as a share of what it would keep (activation_memory_budget)
# Left free: cuDNN's and cuBLAS's workspaces, gaps between blocks of memory. 5 % is what the gaps took with `all`.
RESERVE_SHARE, RESERVE_BYTES = 0.05, 1e9
# Float32 tensors as large as a layer's input that cross-rank batch norm holds at once in its backward pass, where the
# compiler does not melt them into one: dy, x, x̂, dy · x̂ and what is left of dy (batchnorm.py).
NORM_TENSORS = 5


class Saved(NamedTuple):
    """Bytes that autograd saves in a forward pass."""

    tensors: np.ndarray  # one by one, in the order in which they are saved
    at_blocks: np.ndarray  # together, when each block begins

    @property
    def total(self) -> float:
        """Bytes of all tensors together."""
        return float(self.tensors.sum())


@contextlib.contextmanager
def kept_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms inside update copies of their running statistics: their own have seen this batch already."""
    norms = [(module, dict(module._buffers)) for module in block.modules() if isinstance(module, _BatchNorm)]
    for norm, buffers in norms:
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in norms:
            norm._buffers.update(buffers)


def first_and_second_time(block: nn.Module) -> tuple:
    """The contexts in which a block runs in the forward pass and when it is computed again."""
    return contextlib.nullcontext(), kept_statistics(block)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of every stage, in order; none where a network is not built so.

    A stage is a Sequential right inside the backbone, a block one of its parts that has parts itself: a residual
    block of a ResNet, a transformer block.
    """
    stages = [stage for stage in backbone.children() if isinstance(stage, nn.Sequential)]
    return [block for stage in stages for block in stage if list(block.children())]


def recompute_blocks(backbone: nn.Module) -> None:
    """Lets every block of every stage keep its input alone. In place; parameter names stay.

    Raises UserError for a network without blocks.
    """
    blocks = blocks_of(backbone)
    if not blocks:
        raise UserError(
            f"--activations blocks finds no stages of blocks in this {type(backbone).__name__}; "
            "leave it out, or choose a ResNet or a vision transformer"
        )
    for block in blocks:
        contexts = partial(first_and_second_time, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def with_device_defaults(config: PretrainConfig, ranks: Ranks) -> PretrainConfig:
    """--compile, --cuda-graph and --views-together where they were not said: what is fast on this device.

    Raises UserError for --compile, or what needs it, without a C compiler, and for --cuda-graph on other than one GPU.
    """
    cuda = ranks.device.type == "cuda"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if config.compile is None:
        # The bits of --deterministic come before speed; what recomputes otherwise is not compiled.
        wanted = cuda and config.activations != "blocks" and not config.deterministic
        if wanted and not compiler:
            say(ranks, "note: no C compiler (gcc or clang) here, so the network is not compiled: slower steps")
        config = replace(config, compile=config.activations == "half" or bool(wanted and compiler))
    if config.compile and cuda and not compiler:
        raise UserError("--compile: no C compiler here, gcc or clang is expected; install one, or leave --compile out")
    if config.cuda_graph is None:
        again = config.activations == "blocks" or config.deterministic
        reads = config.amp == "fp16" or config.on_nan == "skip"
        small = config.preset.startswith("cifar10") and cuda and ranks.world_size == 1
        config = replace(config, cuda_graph=small and not again and not reads)
    if config.cuda_graph and not (cuda and ranks.world_size == 1):
        raise UserError(
            f"--cuda-graph records the step of one GPU, here are {ranks.world_size} × {ranks.device.type}; leave it out"
        )
    if config.views_together is None:  # faster by 7 % there, slower where batch norm's outputs are joined by a copy
        config = replace(config, views_together=bool(config.compile and config.cuda_graph))
    return config


def largest_side(config: PretrainConfig) -> int:
    """Side of the largest views of a run, px."""
    return max([config.resolution, *(side for _, side in resolution_rows(config.resolution_schedule))])


def saved_bytes(method: Method, images: int, config: PretrainConfig) -> Saved:
    """What autograd saves of a forward pass of so many images, parameters left out."""
    side, device = largest_side(config), next(method.parameters()).device
    found, kept, at_blocks = {}, [], []
    own = {tensor.untyped_storage()._cdata for tensor in (*method.parameters(), *method.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # an address, which fake tensors have too: they have no data
            found[storage._cdata] = storage.nbytes()
        kept.append(storage)  # so that no memory is used twice and counted once
        return tensor.detach()  # the tensor itself may hold the node that holds it, for good

    hooks = [
        block.register_forward_pre_hook(lambda *_: at_blocks.append(sum(found.values())))
        for block in blocks_of(method.backbone)
    ]
    views = [
        torch.zeros(images, 3, side, side, dtype=view_type(config, device), device=device).contiguous(
            memory_format=torch.channels_last
        )
        for _ in method.VIEWS[config.views]
    ]
    # The views are the loader's, whatever is saved of them.
    own |= {view.untyped_storage()._cdata for view in views}
    autocast = torch.autocast(device.type, AMP[config.amp], enabled=config.amp != "off")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        method(views)
    for hook in hooks:
        hook.remove()
    return Saved(np.array(list(found.values()), float), np.array(at_blocks, float))


def at_batch(method: Method, batch: int, config: PretrainConfig) -> Saved:
    """What autograd saves of `batch` images: on the line through two small batches."""
    few, more = (saved_bytes(method, images, config) for images in PROBES)
    steps = (batch - PROBES[0]) / (PROBES[1] - PROBES[0])
    return Saved(*(a + steps * (b - a) for a, b in zip(few, more, strict=True)))


def always_bytes(method: Method, batch: int, config: PretrainConfig) -> int:
    """Weights, gradients, momentum, and views in the making."""
    device = next(method.parameters()).device
    weights = sum(p.nbytes for p in method.parameters())
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    view = batch * 3 * largest_side(config) ** 2 * view_type(config, device).itemsize
    return weights + 2 * trained + BATCHES_OF_VIEWS * len(method.VIEWS[config.views]) * view


def needed_bytes(method: Method, config: PretrainConfig, ranks: Ranks) -> dict[str, float]:
    """Peak of a step's memory by way of keeping activations; "blocks" only where the backbone has blocks.

    Takes a copy of the network, which lies on the ranks' device, and leaves random numbers as they were.
    """
    batch, device = rank_batch(config.global_batch, ranks.world_size), ranks.device
    always: float = always_bytes(method, batch, config)
    # Tensors that no one saves: the backward pass's gradients, or what a target network's own forward pass holds.
    passing = 1 if all(p.requires_grad for p in method.parameters() if p.ndim > 1) else 3
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        copied = copy.deepcopy(method)
        plain = at_batch(copied, batch, config)
        fixed = at_batch(copied, 0, config).total
        always += passing * float(plain.tensors.max())
        norm = NORM_TENSORS * float(plain.tensors.max()) * 4 / AMP[config.amp].itemsize if ranks.world_size > 1 else 0.0
        eager = 0.0 if config.compile else norm
        needed = {"all": always + eager + plain.total, "half": always + fixed + HALF * (plain.total - fixed)}
        if blocks_of(copied.backbone):
            recompute_blocks(copied.backbone)
            thrifty = at_batch(copied, batch, config)
            # The backward pass goes from the last block to the first: what lies behind a block is gone by then.
            inside = np.diff(plain.at_blocks, append=plain.total)
            worst = max(thrifty.total, float((thrifty.at_blocks + inside).max()))
            needed["blocks"] = always + norm + worst
    return needed


def free_bytes(ranks: Ranks) -> float:
    """What a step may take on every rank's GPU: what others use there counts, our own network included, the reserve."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(ranks.device)
    usable = free - RESERVE_SHARE * total - RESERVE_BYTES
    return float(-largest(ranks, -int(usable)))


def with_activations(config: PretrainConfig, method: Method, ranks: Ranks) -> PretrainConfig:
    """--activations auto decided for this network, which lies on the ranks' device.

    Raises UserError before the first step where nothing fits.
    """
    if config.activations != "auto":
        return config
    if ranks.device.type != "cuda":
        return replace(config, activations="all")
    needed, own = needed_bytes(method, config, ranks), sum(p.nbytes for p in method.parameters())
    usable, asked = free_bytes(ranks) + own, config
    ways: list[Activations] = ["all", "half", "blocks"] if config.compile else ["all", "blocks"]  # the fastest first
    way = next((way for way in ways if needed.get(way, np.inf) <= usable), None)
    batch = rank_batch(config.global_batch, ranks.world_size)
    where = f"{batch} images a GPU, {usable / GB:.0f} GB usable"
    if way is None:
        least = min(needed[way] for way in ways if way in needed)
        raise UserError(
            f"a step needs about {least / GB:.0f} GB even with the fewest activations kept ({where}); give a smaller"
            " --global-batch, more GPUs, a smaller --resolution or a narrower --projector"
        )
    if way == "blocks":
        config = replace(config, compile=False, cuda_graph=False)
    lost = [done for done, name in (("compiled", "compile"), ("recorded", "cuda_graph")) if getattr(asked, name)]
    told = f", so not {' or '.join(lost)}" if lost and way == "blocks" else ""
    say(ranks, f"--activations {way}{told}: about {needed[way] / GB:.1f} GB for a step of {where}")
    return replace(config, activations=way)


def compile_parts(config: PretrainConfig, method: nn.Module) -> None:
    """torch.compile of every part, in place, so that parameter names stay; again for each size of views."""
    # Read when a part is compiled, at its first step.
    torch._functorch.config.activation_memory_budget = HALF if config.activations == "half" else 1.0
    for part in method.children():
        part.compile(dynamic=False)
