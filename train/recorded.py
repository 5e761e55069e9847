"""A whole step as one CUDA graph: recorded once, then started as one thing (--cuda-graph).

A step of a small network is some thousand kernels of microseconds each, and starting them one by one takes the CPU
longer than running them takes the GPU. A graph replays them all: forward pass, loss, backward pass, LARS.

    step 1 … ORDINARY     as without a graph: cuDNN chooses its kernels, --compile compiles, LARS makes its momentum
    the next one          recorded, which runs nothing, then replayed
    all others            the views are copied to where the graph reads them, the learning rates set, the graph replayed

What differs between steps must reach the graph through memory: the views and the learning rates (LARS.send_rates) do,
random numbers as well, since PyTorch gives the graph the generator's state. Views of another size start all over.
Other threads (the loader's) may continue while a step is recorded.

tests/test_recorded.py holds it to the ordinary steps on a GPU.
"""

from collections.abc import Callable

import torch

from train.lars import LARS
from train.methods.contract import Metrics

ORDINARY = 3


class RecordedStep:
    """(views) → metrics. `gradients` runs forward and backward pass of some views and returns the step's metrics."""

    def __init__(self, gradients: Callable[[tuple[torch.Tensor, ...]], Metrics], optimizer: LARS):
        self.gradients, self.optimizer = gradients, optimizer
        self.stream = torch.cuda.Stream()
        self.shape: torch.Size | None = None
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def _update(self, views: tuple[torch.Tensor, ...]) -> Metrics:
        metrics = self.gradients(views)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # the next backward pass makes its own: nothing is added up
        return metrics

    def __call__(self, views: tuple[torch.Tensor, ...]) -> Metrics:
        """One update with these views. The metrics are overwritten by the next one."""
        if views[0].shape != self.shape:
            torch.cuda.synchronize()  # a graph's memory goes with it, so it must be through
            self.shape, self.done, self.graph = views[0].shape, 0, None
        self.optimizer.send_rates()
        self.done += 1
        if self.done <= ORDINARY:
            return self._ordinary(views)
        graph = self.graph or self._record(views)
        for own, view in zip(self.views, views, strict=True):
            own.copy_(view)
        graph.replay()
        return self.metrics

    def _ordinary(self, views: tuple[torch.Tensor, ...]) -> Metrics:
        """On the stream that records: what is set up for a stream, such as cuBLAS's memory, is there then."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            metrics = self._update(views)
        torch.cuda.current_stream().wait_stream(self.stream)
        return metrics

    def _record(self, views: tuple[torch.Tensor, ...]) -> torch.cuda.CUDAGraph:
        self.views = tuple(torch.empty_like(view) for view in views)
        self.graph = torch.cuda.CUDAGraph()
        # Errors for what this thread must not do while recording; the loader's threads allocate and copy meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.metrics = self._update(self.views)
        return self.graph
