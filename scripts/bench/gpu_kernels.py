"""The view kernels on a GPU: are their values numba's, how long does each take, which launch settings are faster.

    gate     eight real images, several epochs' views: the GPU's values against numba's, float32 and bf16
    kernels  both views of 1024 images: all kernels together, and each apart beside the bandwidth of a plain copy
    tune     the same with other launch settings, one kernel at a time, its views compared with the usual ones

Kernels are timed between events. The GPU is given something to do first, so that every launch is queued before the
first one begins and no time of Python's is in the figures.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import triton.runtime.jit as triton_jit
from gpu_record import Record, StageConfig
from measure import GB, Interval, interval

from pipeline.choices.draws import ViewParams, draw_views
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.loaders.parts import PartsLoader
from pipeline.loaders.resident import ResidentPixels
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig, Normalization
from pipeline.views.augment_gpu import make_views
from pipeline.views.gpu_plan import BLUR, BOX_HEIGHT, BOX_WIDTH, ViewPlan, plan_views

TYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
INTERPOLATIONS = [view.interpolation for view in BARLOW_TWINS_VIEWS]
AHEAD_CYCLES = 20_000_000  # of the GPU's clock, about 10 ms: longer than Python takes to launch the kernels
WARPS = (1, 2, 4, 8)  # what `tune` tries where no list is given


class Images:
    """Decoded images on the device, and views planned of them; images of a small file are repeated."""

    def __init__(self, config: StageConfig, images: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.side_px = 8 if config.dry_run else 224
        path = config.data / "train.beton"
        loading = LoaderConfig(path, BARLOW_TWINS_VIEWS, self.side_px, 1, views_on="gpu", device=str(self.device))
        self.loader = PartsLoader(loading, ResidentPixels)
        self.ids = np.arange(images) % self.loader.images
        decoded = self.loader.pixels
        assert isinstance(decoded, ResidentPixels)
        self.pixels, self.starts = decoded.pixels, decoded.starts[self.ids]
        self.heights, self.widths = (size[self.ids] for size in self.loader.sizes)

    def params(self, epoch: int) -> ViewParams:
        return draw_views(
            0, epoch, np.arange(len(self.ids)), self.heights, self.widths, BARLOW_TWINS_VIEWS, self.side_px
        )

    def plan(self, epoch: int) -> ViewPlan:
        """On the CPU."""
        return plan_views(self.params(epoch), self.starts, self.heights, self.widths, INTERPOLATIONS, self.side_px)

    def views(self, plan: ViewPlan, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return make_views(self.pixels, plan, Normalization(), dtype)

    def views_by_numba(self, epochs: int) -> Iterator[torch.Tensor]:
        """Each epoch's views (V, B, H, W, 3) float32, from the loader that makes them on the CPU; every image once."""
        on_cpu = replace(self.loader.config, views_on="cpu", device="cpu", ids=self.ids, global_batch=len(self.ids))
        with make_loader(on_cpu) as loader:
            for batch in loader.batches(0, epochs):
                order = torch.argsort(batch.sample)
                yield torch.stack([view[order].permute(0, 2, 3, 1) for view in batch.views])

    def close(self) -> None:
        self.loader.close()


def measure_gate(config: StageConfig, record: Record) -> None:
    images = Images(config, 2 if config.dry_run else 8)
    compared, differ = dict.fromkeys(TYPES, 0), dict.fromkeys(TYPES, 0)
    epochs = 1 if config.dry_run else 8
    for epoch, expected in enumerate(images.views_by_numba(epochs)):
        plan = images.plan(epoch).to(images.device)
        for name, dtype in TYPES.items():
            for view, numbas in zip(images.views(plan, dtype), expected.to(dtype), strict=True):
                compared[name] += numbas.numel()
                differ[name] += int((view.permute(0, 2, 3, 1).cpu() != numbas).sum())
        record.write(rounds=epoch + 1, images=len(images.ids), values=compared, differ=differ)
    images.close()
    passed = not any(differ.values())
    record.write(complete=passed, passed=passed)
    if not passed:  # not done: the same command compares again what has been mended
        raise UserError(f"{differ} of {compared} values differ from numba's; tests/test_augment_gpu.py says where")


# ---- time ----


def mark() -> "torch.cuda.Event | float":
    """Now: on a GPU an event, which makes nothing wait."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(begin, end) -> float:
    """Between two marks that are past."""
    return 1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


@contextlib.contextmanager
def each_launch(around: Callable, settings: dict | None = None) -> Iterator[None]:
    """Inside it, every kernel[grid](…) is around(kernel's name, what launches it).

    `settings` of one kernel replace its keywords; a "grid" in it replaces the grid's parts that are not null.
    """
    usual, settings = triton_jit.KernelInterface.__getitem__, dict(settings or {})
    named, own_grid = settings.pop("kernel", None), settings.pop("grid", None)

    def launcher(kernel, grid):
        own = kernel.__name__ == named
        if own and own_grid:
            grid = tuple(part if new is None else new for part, new in zip(grid, own_grid, strict=True))

        def launch(*arguments, **keywords):
            keywords |= settings if own else {}
            return around(kernel.__name__, lambda: usual(kernel, grid)(*arguments, **keywords))

        return launch

    triton_jit.KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        triton_jit.KernelInterface.__getitem__ = usual


def work_ahead() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD_CYCLES)


def together_ms(work: Callable) -> tuple[float, float]:
    """How long the device takes for all that `work` queues, and the CPU to queue it."""
    work_ahead()
    begin, start = mark(), time.perf_counter()
    work()
    host_ms, end = 1000 * (time.perf_counter() - start), mark()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return between_ms(begin, end), host_ms


def apart_ms(work: Callable, settings: dict | None = None) -> dict[str, float]:
    """How long every launch takes, by kernel; a kernel's second launch is called "name 2"."""
    marks: dict[str, tuple] = {}

    def around(name: str, launch: Callable):
        count = sum(known.split()[0] == name for known in marks)
        begin = mark()
        result = launch()
        marks[f"{name} {count + 1}" if count else name] = begin, mark()
        return result

    work_ahead()
    with each_launch(around, settings):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: between_ms(*both) for name, both in marks.items()}


def copy_bandwidth(config: StageConfig) -> float:
    """Bytes a second, those read and those written together, of a plain copy on the device."""
    size_bytes = (1 << 20) if config.dry_run else (4 << 30)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = torch.randint(256, (2, size_bytes // 2), dtype=torch.uint8, device=device)
    ms = [together_ms(lambda: target.copy_(source))[0] for _ in range(13)][3:]
    return size_bytes / (max(float(np.median(ms)), 1e-6) / 1000)


# ---- bytes ----


def boxes_bytes(plan: ViewPlan) -> int:
    """The pixels that the views are cut from, three bytes each."""
    return int((plan.table[:, BOX_HEIGHT.value] * plan.table[:, BOX_WIDTH.value]).sum()) * 3


def moved_bytes(plan: ViewPlan, bytes_per_value: int) -> dict[str, int]:
    """What each launch reads and writes for a plan, by its name in apart_ms."""
    views, blurred, side = len(plan.table), int(plan.table[:, BLUR.value].sum()), plan.side_px
    boxes = boxes_bytes(plan)
    coefficients, between, colours = (4 * count for count in (plan.taps * side, plan.between_px, side * plan.pitch_px))
    plane, view = 3 * side * plan.pitch_px, 3 * side * side * bytes_per_value
    return {
        "fill_coefficients": coefficients,
        "resize_once": boxes + between + coefficients,
        "start_colours": between + coefficients + views * colours,
        "finish_colours": views * colours + (views - blurred) * view + blurred * plane,
        "blur_lines": 2 * blurred * plane,
        "blur_lines 2": blurred * (plane + view),
    }


def least_bytes(plan: ViewPlan, bytes_per_value: int) -> int:
    """What no design could save: the boxes in, the views out."""
    return boxes_bytes(plan) + len(plan.table) * 3 * plan.side_px**2 * bytes_per_value


def kernel_summary(ms: list[float], moved: int | None, copy: float) -> dict[str, Interval | float | None]:
    """One kernel's times, and its share of the copy's bandwidth if its bytes are known and it took any time."""
    seconds = float(np.median(ms)) / 1000
    share = round(moved / seconds / copy, 3) if moved is not None and seconds > 0 else None
    return {"ms": interval(ms), "share_of_copy_bandwidth": share}


def measure_kernels(config: StageConfig, record: Record) -> None:
    """All kernels together, then each apart, in turn with the other type of views."""
    images, copy = Images(config, 1 if config.dry_run else 1024), copy_bandwidth(config)
    start = time.perf_counter()
    plans = [images.plan(epoch) for epoch in range(4)]  # several, so that no cache holds what a step would not find
    plan_ms = 1000 * (time.perf_counter() - start) / len(plans)
    on_device = [plan.to(images.device) for plan in plans]
    found: dict[str, object] = {"images": len(images.ids), "views": len(INTERPOLATIONS), "side_px": images.side_px}
    found |= {"copy_gb_per_s": round(copy / GB, 1), "plan_on_cpu_ms": round(plan_ms, 2)}
    for name, dtype in TYPES.items():
        moved, least = moved_bytes(plans[0], dtype.itemsize), least_bytes(plans[0], dtype.itemsize)
        together_and_host, apart = [], []
        for turn in range(0, 1) if config.dry_run else range(-2, 12):
            work = partial(images.views, on_device[turn % 4], dtype)
            both, kernels = together_ms(work), apart_ms(work)
            if turn < 0:
                continue
            together_and_host.append(both)
            apart.append(kernels)
            together, host = zip(*together_and_host, strict=True)
            found[name] = {
                "ms": interval(together),
                "host_ms": interval(host),
                "moved_bytes": sum(moved.values()),
                "least_bytes": least,
                "floor_ms": round(1000 * least / copy, 3),
                "kernels": {k: kernel_summary([one[k] for one in apart], moved.get(k), copy) for k in kernels},
            }
            record.write(rounds=turn + 1, **found)
    images.close()
    record.write(complete=True)


def measure_tune(config: StageConfig, record: Record) -> None:
    """Each setting is {"kernel": name, "grid": [null, 7, 7]} and keywords of the launch: "ROWS": 16, "num_warps": 4."""
    images = Images(config, 1 if config.dry_run else 1024)
    plans = [images.plan(epoch).to(images.device) for epoch in range(1 if config.dry_run else 4)]
    usual = images.views(plans[0], torch.bfloat16)
    runs = [apart_ms(partial(images.views, plan, torch.bfloat16)) for plan in plans]
    kernels = dict.fromkeys(name.split()[0] for name in runs[0])
    rows = [{"settings": {"kernel": kernel}, "ms": ms_of(kernel, runs), "equal": True} for kernel in kernels]
    tried = [{"kernel": name, "num_warps": warps} for name in kernels for warps in WARPS]
    if config.launches:
        tried = json.loads(config.launches.read_text("utf-8"))
    for setting in tried:
        rows.append({"settings": setting} | tuned(images, plans, setting, usual))
        record.write(rounds=len(rows), rows=rows)
    images.close()
    record.write(complete=True)


def ms_of(kernel: str, runs: list[dict[str, float]]) -> Interval:
    """The time of all launches of a kernel together, over several runs."""
    return interval([sum(ms for name, ms in run.items() if name.split()[0] == kernel) for run in runs])


def tuned(images: Images, plans: list[ViewPlan], setting: dict, usual: tuple[torch.Tensor, ...]) -> dict:
    """ms of the kernel's launches together, and whether the views are the usual ones; or why it cannot run."""
    try:
        with each_launch(lambda _, launch: launch(), setting):
            views = images.views(plans[0], torch.bfloat16)
        equal = all(torch.equal(own, other) for own, other in zip(views, usual, strict=True))
        runs = [apart_ms(partial(images.views, plan, torch.bfloat16), setting) for plan in plans * 2]
    except Exception as error:  # a setting that cannot be compiled or launched keeps no other from being tried
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    return {"ms": ms_of(setting["kernel"], runs[len(plans) :]), "equal": equal}
