"""What tests/test_null_cuda.py runs in a program of its own, on a CUDA runtime whose kernels do nothing.

steps plain|graph FOLDER   a short run of the trainer with every method: what its last steps called, by method
memory WAY BATCH           steps of the ImageNet card at full size: what they took, and the estimate
chosen BATCH ...           what --activations auto chooses for the ImageNet card, by batch; null where nothing fits
faults                     what is counted where a program reads back, copies what is not pinned, waits while recording
"""

import contextlib
import ctypes
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.spec import Batch
from train import runlog
from train.cards import PRESETS
from train.config import AMP, METHOD_NAMES
from train.distributed import Ranks
from train.flags import resolved
from train.lars import LARS
from train.memory import compile_parts, needed_bytes, recompute_blocks, with_activations, with_device_defaults
from train.methods.choose import make_method
from train.model import make_backbone
from train.pretrain import train
from train.run_data import view_type

GPU = Ranks(0, 1, torch.device("cuda", 0), None)
COUNTED = ("syncs", "launches", "pageable_copies", "mallocs", "copies_to_host", "graphs", "illegal")
STEPS, ORDINARY = 8, 5  # the first may wait: what is set up once, and the recording of the graph


def counts() -> dict[str, int]:
    found = (ctypes.c_long * len(COUNTED))()
    ctypes.CDLL(None).nullcuda_counts(found)
    return dict(zip(COUNTED, found, strict=True))


class Loader:
    """The same views step after step; notes the counts before each."""

    steps_per_epoch, images, ids = STEPS, 16 * STEPS, range(16 * STEPS)

    def batches(self, start_step=0, stop_step=None):
        self.seen = []
        views = tuple(torch.zeros(16, 3, 32, 32, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for step in range(start_step, stop_step):
            self.seen.append(counts())
            yield Batch(views, None, None, step, 0, 0)


def steps(way: str, folder: str) -> dict:
    runlog.RUNS, found = Path(folder), {}
    for method in METHOD_NAMES:
        card = PRESETS["cifar10" if method == "barlow_twins" else f"cifar10-{method}"]
        card = replace(card, epochs=1, warmup_epochs=0, global_batch=16, knn_every=0, log_every=100, compile=False)
        card = replace(card, queue=min(card.queue, 6 * 16))
        loader, run = Loader(), str(Path(folder, method))
        code = train(resolved(replace(card, run=run, cuda_graph=way == "graph")), GPU, loader)
        first, last = loader.seen[ORDINARY], loader.seen[-1]
        found[method] = {"code": code} | {name: last[name] - first[name] for name in last}
        found[method]["illegal"] = counts()["illegal"]
    return found


def network(config):
    return make_method(*make_backbone(config.arch, config.stem), config).to("cuda", memory_format=torch.channels_last)


def memory(way: str, batch: str) -> dict:
    config = resolved(replace(PRESETS["imagenet"], run="null", global_batch=int(batch), activations=way))
    method = network(config)
    estimate = needed_bytes(method, config, GPU)[way]
    if way == "blocks":
        recompute_blocks(method.backbone)
    if way == "half":
        compile_parts(config, method)
    optimizer = LARS(method.parameter_groups(), eta=config.lars_eta)
    kind = {"dtype": view_type(config, GPU.device), "device": GPU.device}
    views = tuple(torch.empty(int(batch), 3, 224, 224, **kind) for _ in range(2))
    views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
    for _ in range(2):
        with torch.autocast("cuda", AMP[config.amp]):
            loss, _ = method(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ahead = 3 * 2 * views[0].nbytes  # the batches that a loader makes meanwhile, which are not here
    return {"estimate_gb": (estimate - ahead) / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def chosen(*batches: str) -> dict:
    found = {}
    for batch in batches:
        config = resolved(replace(PRESETS["imagenet"], run="null", global_batch=int(batch)))
        try:
            found[batch] = with_activations(with_device_defaults(config, GPU), network(config), GPU).activations
        except UserError:
            found[batch] = None
    return found


def wait_while_recording(tensor: torch.Tensor) -> None:
    stream = torch.cuda.Stream()
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        tensor.sum().item()


def faults() -> dict:
    tensor, found = torch.zeros(1000, device="cuda"), {}
    mistakes = {
        "read back": lambda: tensor.sum().item(),
        "not pinned": lambda: tensor.copy_(torch.ones(1000), non_blocking=True),
        "recording": lambda: wait_while_recording(tensor),
    }
    for name, mistake in mistakes.items():
        before = counts()
        mistake()
        found[name] = [what for what, count in counts().items() if count > before[what]]
    return found


if __name__ == "__main__":
    commands = {"steps": steps, "memory": memory, "chosen": chosen, "faults": faults}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])), flush=True)
    # A backward pass may have ended a moment ago, and its thread still lets go of Python objects: that aborts a process
    # whose interpreter is shutting down (Python before 3.14). What is tested here ends with the answer.
    os._exit(0)
