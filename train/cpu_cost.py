"""What a step costs on a CPU, said before the first one: a network made for GPUs takes gigabytes and minutes there.

Nothing is run for it: a step is played through without data (PyTorch's fake tensors), which counts its operations and
what it saves for the backward pass; a small convolution shows how many operations this machine does in a second.
"""

import copy
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.choices.order import rank_batch
from pipeline.loaders.resident import free_bytes
from pipeline.progress import duration_text
from train.config import AMP
from train.distributed import say
from train.memory import GB, always_bytes, saved_bytes
from train.update import Update

LARGE_PARAMETERS = 5_000_000  # smaller networks are not counted: their steps are quick
WORTH_A_WORD_S, WORTH_A_WORD_SHARE = 20.0, 0.5  # of a step; of the free memory
PASSES = 3  # a backward pass has twice the operations of a forward pass
IMAGES, CHANNELS, SIDE = 4, 64, 16  # of the convolution that is timed
SLOW_TYPE = 1.5  # times as long as in float32, from which on it is said: less is chance


def step_cost(update: Update) -> tuple[float, float]:
    """(bytes at the peak of a step, operations of its forward and backward pass). Changes nothing of the network."""
    config, batch = update.config, rank_batch(update.config.global_batch, update.ranks.world_size)
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = (*update.method.parameters(), *update.method.buffers())
    network = copy.deepcopy(update.method, {id(tensor): without_data.from_tensor(tensor) for tensor in tensors})
    with torch.random.fork_rng([]), without_data:
        with FlopCounterMode(display=False) as counter:
            saved = saved_bytes(network, batch, config)
        always = always_bytes(network, batch, config)
    return always + saved.total, PASSES * counter.get_total_flops()


def operations_per_s(dtype: torch.dtype) -> float:
    """Of a 3×3 convolution on this CPU, the best of three. With its backward pass, which may be what is slow."""
    images = torch.ones(IMAGES, CHANNELS, SIDE, SIDE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    inputs = images.requires_grad_(), torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype, requires_grad=True)
    seconds = []
    for _ in range(3):
        begun_s = time.perf_counter()
        output = torch.nn.functional.conv2d(*inputs, padding=1)
        torch.autograd.grad(output, inputs, output.detach())
        seconds.append(time.perf_counter() - begun_s)
    return PASSES * 2 * 9 * CHANNELS**2 * SIDE**2 * IMAGES / min(seconds)


def say_cost(update: Update) -> None:
    """Says it where a step takes long or much of the free memory; on one process alone, whose norms need no others.

    And where the CPU has no fast way to compute in the type of --amp: there a step can take a hundred times as long.
    """
    config, ranks = update.config, update.ranks
    if ranks.device.type != "cpu":
        return
    per_s = operations_per_s(AMP[config.amp])
    if config.amp != "off" and (times := operations_per_s(torch.float32) / per_s) > SLOW_TYPE:
        text = f"a convolution in {config.amp} takes {times:.0f} × as long as in float32; --amp off makes steps faster"
        say(ranks, f"note: on this CPU {text}")
    if ranks.world_size > 1 or sum(p.numel() for p in update.method.parameters()) < LARGE_PARAMETERS:
        return
    needed, operations = step_cost(update)
    seconds, free = operations / per_s, free_bytes(ranks.device)
    if seconds < WORTH_A_WORD_S and needed < WORTH_A_WORD_SHARE * free:
        return
    ends = ", so the system may end it" if needed > free else ""
    say(
        ranks,
        f"note: on this CPU a step of {config.global_batch} images with {config.arch} takes about "
        f"{duration_text(seconds)} and {needed / GB:.3g} GB ({free / GB:.3g} GB are free{ends}); it is made for a "
        "GPU; --preset cifar10-demo, or --arch resnet18 and a smaller --global-batch, --resolution and "
        "--projector need less",
    )
