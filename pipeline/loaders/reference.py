"""The reference: Pillow decodes, torchvision's functions make the views, DataLoader processes do the work.

It shares the order, the draws and the stand-ins with the loader made of parts, and nothing that it proves: neither
decoder nor kernels nor threads. It yields the same batches, at the speed such pipelines usually have.

    trainer ── fork server, once it has imported what they need ── worker processes
       ◀────────────── views in shared memory, the rest by a pipe ──────┘
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.utils.data
import torchvision.transforms.functional as F
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pipeline.errors import UserError
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.base import Loader, samples_in_use, view_params
from pipeline.spec import Batch, LoaderConfig
from pipeline.stopping import STOP_SIGNALS, end_with_parent
from pipeline.storage.beton import Beton, open_beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.views.reference import apply_view_pil

# Ctrl-C, and what a batch system sends, reach the whole process group. It is the trainer that decides when its workers
# end; with SIGTERM, if one of them hangs.
NOT_FOR_WORKERS = {*STOP_SIGNALS} - {signal.SIGTERM}


@contextlib.contextmanager
def _unsignalled() -> Iterator[None]:
    """A fork server that begins inside is spared those signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_number: int) -> None:
    """A worker's first act: it leaves signals to the trainer, and ends with it. DataLoader watches the fork server."""
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 memory (B, 3, S, S), channels-last, that the trainer sees too. Raises UserError if there is too little.

    A tensor that is not shared yet would be when it is sent, in a thread whose error nobody hears: the trainer waits.
    """
    memory = torch.empty(shape, memory_format=torch.channels_last)
    try:
        return memory.share_memory_() if len(memory) else memory
    except RuntimeError as error:
        raise UserError(
            f"/dev/shm has no room for a batch ({str(error).splitlines()[0]}); give it more (docker run --shm-size=8g),"
            " or take fewer --workers, or --loader fast, which needs none"
        ) from None


class _Steps(torch.utils.data.Dataset):
    """(step, epoch, ids) → that batch's tensors, made in a DataLoader process; a UserError comes back as a value."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config

    @cached_property
    def beton(self) -> Beton:
        """Opened where it is used: a memory map must not be pickled."""
        return open_beton(self.config.data)

    @cached_property
    def bad(self) -> BadImages:
        """What this process has found so far."""
        return BadImages(self.config, self.beton, samples_in_use(self.config, self.beton))

    def __getitem__(self, request: tuple[int, int, np.ndarray]) -> tuple | UserError:
        step, epoch, wanted = request
        try:
            ids = self.bad.decodable(epoch, wanted)
            return self._views(epoch, ids), ids.tolist(), step, epoch, int((ids != wanted).sum())
        except UserError as error:
            return error

    def _views(self, epoch: int, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
        c, side = self.config, self.config.resolution_at(epoch)
        params = view_params(c, self.beton, epoch, ids)
        shape = (len(ids), 3, side, side)
        views = tuple(_shared(shape) for _ in c.rows)
        for b, sample in enumerate(ids):
            image = decode_pil(self.beton, int(sample))
            for v, row in enumerate(c.rows):
                view = apply_view_pil(image, params, b, v, row.interpolation, side)
                views[v][b] = F.normalize(F.to_tensor(view), c.normalization.mean, c.normalization.std)
        return views


# How torch says that a batch's shared memory, which comes as a file descriptor, found no free one here.
_NO_FILES = ("Too many open files", "received 0 items of ancdata")


class _Pass:
    """What the DataLoader takes its work from: the stream of the pass that runs."""

    stream: Iterator = iter(())

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        return self.stream


class _Processes(_MultiProcessingDataLoaderIter):
    """torch's worker processes. Where only some could be started, they end at once; torch's own end is a traceback."""

    def __init__(self, loader: torch.utils.data.DataLoader) -> None:
        try:
            super().__init__(loader)
        except BaseException:
            for worker in getattr(self, "_workers", ()):
                worker.kill()
            if getattr(self, "_worker_pids_set", False):
                torch.utils.data._utils.signal_handling._remove_worker_pids(id(self))
            self._shutdown, self._worker_pids_set = True, False
            raise


class _DataLoader(torch.utils.data.DataLoader):
    def _get_iterator(self) -> _Processes:
        return _Processes(self)


class TorchLoader(Loader):
    """Batches from a .beton file by Pillow and torchvision; see LoaderConfig and Batch for what is in them."""

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        self._pass = _Pass()
        # A forked process would inherit numba's and torch's thread pools in an unknown state. So a clean server
        # forks the workers, once it has imported what they need.
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        self._loader: _DataLoader | None = _DataLoader(
            _Steps(config),
            batch_size=None,
            sampler=self._pass,
            num_workers=self.workers,
            multiprocessing_context="forkserver",
            persistent_workers=True,
            worker_init_fn=_start_worker,
        )

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        c = self.config
        stream = self._pass.stream = self.stream(start_step, stop_step)
        for made in self._made():
            views, ids, *numbers = made
            sample, label = torch.tensor(ids, dtype=torch.int64), torch.from_numpy(self.labels[ids])
            views = tuple(view.to(c.device, c.view_type) for view in views)
            yield Batch(views, label.to(c.device), sample.to(c.device), *numbers)
            self.require_open()
            if self._pass.stream is not stream:
                raise UserError("another pass was begun on this loader: its processes make one pass at a time")

    def _made(self) -> Iterator[tuple]:
        """What the workers make of the stream. Raises UserError for theirs, if they cannot start, or if one died."""
        assert self._loader is not None
        try:
            with _unsignalled():
                batches = iter(self._loader)
        except (OSError, EOFError, RuntimeError) as error:  # the second: of a fork server that ended while it started
            if isinstance(error, RuntimeError) and not str(error).startswith("can't start new thread"):
                raise
            raise UserError(
                f"the worker processes of --loader torch cannot be started ({str(error) or type(error).__name__}); take"
                " fewer --workers, or allow more processes and open files (ulimit -u, ulimit -n)"
            ) from error
        while True:
            try:
                made = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: in the middle of receiving
                if isinstance(error, RuntimeError) and str(error).startswith(_NO_FILES):
                    raise UserError(
                        "too many open files to receive a batch from the worker processes of --loader torch; allow more"
                        " open files (ulimit -n), and run the same command again"
                    ) from error
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                    raise
                raise UserError(
                    "a worker process of --loader torch died: what it said stands above; without a word it was killed,"
                    " for too little memory perhaps; run the same command again, with fewer --workers"
                ) from error
            if isinstance(made, UserError):
                raise made
            yield made

    def close(self) -> None:
        """Ends the worker processes. The loader cannot be used afterwards."""
        super().close()
        self._loader = None
