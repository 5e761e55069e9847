"""The reference loader: its batches are what torchvision makes of the stored files, and it keeps the contract."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from pipeline.choices.draws import draw_views
from pipeline.choices.order import shuffled_batches
from pipeline.errors import UserError
from pipeline.loaders.reference import TorchLoader, _Steps
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, LoaderConfig, Normalization
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.views.reference import apply_view_pil
from tests.conversions import living
from tests.support import REPO

RESOLUTION = 64
pytestmark = pytest.mark.slow  # each loader starts a process that imports torch


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    views = BARLOW_TWINS_VIEWS
    return LoaderConfig(small_beton, views, RESOLUTION, global_batch=12, seed=3, workers=1, backend="torch")


def end_fork_server() -> None:
    """And with it its processes, for which its own end would wait."""
    server = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()


@pytest.fixture(scope="module")
def loader(config):
    end_fork_server()  # that of another test: in a training, the loader is the first
    loader = TorchLoader(config)
    yield loader
    loader.close()


def test_batches_are_torchvisions_views_of_the_stored_files(config, loader):
    batches = list(loader.batches(3, 6))  # across the end of an epoch of four steps
    plan = list(shuffled_batches(config.seed, np.arange(48), 12, 0, 1, 3, 6))
    beton = open_beton(config.data)
    normalize = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    for batch, (step, epoch, ids) in zip(batches, plan, strict=True):
        assert (batch.step, batch.epoch) == (step, epoch)
        assert batch.sample.tolist() == ids.tolist()
        assert batch.label.tolist() == beton.labels[ids].tolist()
        params = draw_views(3, epoch, ids, beton.heights[ids], beton.widths[ids], BARLOW_TWINS_VIEWS, RESOLUTION)
        for b in range(0, len(ids), 5):
            image = decode_pil(beton, int(ids[b]))
            for v in range(2):
                view = normalize(apply_view_pil(image, params, b, v, "bicubic", RESOLUTION))
                assert torch.equal(batch.views[v][b], view)
    assert {batch.epoch for batch in batches} == {0, 1}
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batches[0].views)


def test_left_early_it_starts_again_anywhere(loader):
    for batch in loader.batches(0, 50):
        if batch.step == 1:
            break
    again = next(iter(loader.batches(1, 2)))
    assert torch.equal(again.sample, batch.sample) and torch.equal(again.views[1], batch.views[1])


def test_the_centre_crop_is_torchvisions(config, imagenet_sample):
    normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ids = np.array([47, 2, 2, 11, 30])
    loader = TorchLoader(
        replace(config, views=CentreCrop(80), shuffle=False, ids=ids, global_batch=2, normalization=normalization)
    )
    assert (loader.images, loader.steps_per_epoch) == (5, 3)
    for _ in range(2):  # one pass, and the same once more with the same processes
        batches = list(loader.batches())
        assert [len(batch.sample) for batch in batches] == [2, 2, 1]
        assert torch.cat([batch.sample for batch in batches]).tolist() == ids.tolist()
    loader.close()
    transform = T.Compose(
        [T.Resize(80), T.CenterCrop(RESOLUTION), T.ToTensor(), T.Normalize(normalization.mean, normalization.std)]
    )
    names = open_beton(config.data).file_names()
    files = {path.name: path for path in imagenet_sample}
    for sample, view in zip(ids, torch.cat([batch.views[0] for batch in batches]), strict=True):
        image = Image.open(files[names[sample].rsplit("/")[-1]]).convert("RGB")
        assert torch.equal(view, transform(image))


def test_a_rank_without_a_share_gets_an_empty_batch(config):
    loader = TorchLoader(
        replace(config, views=CentreCrop(80), shuffle=False, ids=np.arange(3), global_batch=2, rank=1, world_size=2)
    )
    assert [tuple(batch.views[0].shape) for batch in loader.batches()] == [(1, 3, 64, 64), (0, 3, 64, 64)]
    loader.close()


def test_raw_pixels_are_taken_as_they_are(small_beton):
    beton = open_beton(small_beton)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    raw = replace(
        beton,
        data=pixels.reshape(-1),
        modes=np.array([1], np.uint8),
        offsets=np.array([0]),
        sizes_bytes=np.array([60]),
        heights=np.array([4]),
        widths=np.array([5]),
    )
    assert np.array_equal(np.asarray(decode_pil(raw, 0)), pixels)


def is_grey(path) -> bool:
    with Image.open(path) as image:
        return image.mode == "L"


def test_greyscale_files_come_out_as_rgb(imagenet_sample, small_beton):
    grey = next(path for path in imagenet_sample if is_grey(path))
    content = np.fromfile(grey, np.uint8)
    with Image.open(grey) as image:
        (width, height), expected = image.size, np.asarray(image.convert("RGB"))
    beton = replace(
        open_beton(small_beton),
        data=content,
        modes=np.array([0], np.uint8),
        offsets=np.array([0]),
        sizes_bytes=np.array([content.size]),
        heights=np.array([height]),
        widths=np.array([width]),
    )
    assert np.array_equal(jpeg_bytes(beton, 0), content)
    assert np.array_equal(np.asarray(decode_pil(beton, 0)), expected)
    with pytest.raises(UserError, match=r"the table says \(7, 9\)"):
        decode_pil(replace(beton, heights=np.array([9]), widths=np.array([7])), 0)


def test_a_damaged_image_is_named(config, tmp_path):
    for path in config.data.parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    beton = open_beton(config.data)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(int(beton.offsets[11]))
        file.write(bytes(int(beton.sizes_bytes[11])))
    loader = TorchLoader(replace(config, data=tmp_path / "train.beton"))
    with pytest.raises(UserError, match=beton.file_names()[11]):
        list(loader.batches(0, 4))
    loader.close()


def test_signals_to_the_process_group_end_no_worker(loader):
    """Ctrl-C, and what a batch system sends before the time is over: only the trainer decides when to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = loader.batches(0, 10)
    next(batches)
    (worker,) = loader._loader._iterator._workers
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        for pid in (worker.pid, server):
            os.kill(pid, number)
    assert [batch.step for batch in batches] == list(range(1, 10)) and worker.is_alive()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_shared_memory_that_is_full_is_told(loader):
    """Stood for by a limit of the worker's files, which shared memory is; the trainer would wait for ever."""
    batches = loader.batches(0, 10)
    next(batches)
    (worker,) = loader._loader._iterator._workers
    limits = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=r"^/dev/shm has no room for a batch \(.*; give it more"):
        list(batches)
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, limits)
    assert len(list(loader.batches(0, 2))) == 2


@contextlib.contextmanager
def files_left(number: int) -> Iterator[None]:
    """As few more files as that can be opened by this process."""
    gc.collect()  # else files of earlier tests are closed meanwhile, and more are left
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (fd for fd in itertools.count() if not os.path.exists(f"/proc/self/fd/{fd}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, number, None)), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_open_files_to_receive_are_told(config):
    loader = TorchLoader(config)
    batches = loader.batches(0, 40)
    next(batches)
    with files_left(0), pytest.raises(UserError, match="^too many open files to receive a batch"):
        list(batches)
    loader.close()


def test_a_killed_worker_is_told(loader):
    """The last one that uses this loader."""
    batches = loader.batches(0, 40)
    next(batches)
    (worker,) = loader._loader._iterator._workers
    worker.kill()
    with pytest.raises(UserError, match="^a worker process of --loader torch died: "):
        list(batches)


def no_process_left() -> None:
    end = time.monotonic() + 10
    while left := multiprocessing.active_children():
        assert time.monotonic() < end, left
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (multiprocessing.context.ForkServerProcess, OSError(11, "Resource temporarily unavailable")),
        (multiprocessing.queues.Queue, RuntimeError("can't start new thread")),
    ],
)
def test_workers_that_only_partly_start_end(config, monkeypatch, part, error):
    """The second process cannot be had, or the second thread that sends to one."""
    name = "start" if hasattr(part, "start") else "_start_thread"
    start, calls = getattr(part, name), []

    def first_only(self):
        calls.append(self)
        if len(calls) == 2:
            raise error
        start(self)

    loader = TorchLoader(replace(config, workers=2))
    monkeypatch.setattr(part, name, first_only)
    with pytest.raises(UserError, match="^the worker processes of --loader torch cannot be started") as raised:
        next(loader.batches(0, 2))
    assert len(calls) == 2 and raised.value.__cause__ is error
    no_process_left()  # while the error is held
    loader.close()
    gc.collect()  # torch's own end of what was started says nothing


@pytest.mark.parametrize("number", [0, 4, 8, 11, 14])
def test_too_few_open_files_are_told(config, number):
    """None of the two workers can start, or one, or what they made cannot be received; nothing of them stays behind."""
    end_fork_server()
    loader = TorchLoader(replace(config, workers=2))
    try:
        with files_left(number), pytest.raises(UserError, match=r"worker processes of --loader torch.* open files"):
            next(loader.batches(0, 2))
        loader.close()
        gc.collect()
        no_process_left()
    finally:
        end_fork_server()  # it has the limit, too


KILLED = """
import sys, time
from pathlib import Path
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
config = LoaderConfig(Path(sys.argv[1]), BARLOW_TWINS_VIEWS, 32, global_batch=8, workers=1, backend="torch")
loader = make_loader(config)
batches = loader.batches(0, 100)
next(batches)
print("begun", flush=True)
time.sleep(60)
"""


def test_a_killed_trainer_leaves_no_process_behind(config):
    command = [sys.executable, "-c", KILLED, str(config.data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPO, start_new_session=True) as process:
        assert process.stdout.readline() == b"begun\n"
        assert len(living(process.pid)) >= 3  # its fork server and a worker
        process.kill()
    end = time.monotonic() + 10
    while left := living(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_the_file_is_not_copied_into_the_workers(config):
    steps = _Steps(config)
    steps.beton = None
    assert len(pickle.dumps(steps)) < 10_000


def test_user_errors(config, tmp_path):
    with pytest.raises(UserError, match="missing"):
        TorchLoader(replace(config, data=tmp_path / "none.beton"))
    with pytest.raises(UserError, match="larger than the dataset"):
        TorchLoader(replace(config, global_batch=64))
    with pytest.raises(UserError, match="not divisible"):
        TorchLoader(replace(config, world_size=5))
