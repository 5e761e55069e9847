"""The loader in a stranger's program: the README's loops as they stand there, and what wrong arguments are told."""

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, Blocks, CentreCrop, LoaderConfig, Normalization, Squash, ViewSpec
from tests.support import assert_same_batch, assert_same_batches

REPO = Path(__file__).resolve().parents[1]
SMALL = {'"data/imagenet/train.beton"': "sys.argv[1]", "224, global_batch=256": "32, global_batch=16, workers=1"}
NETWORK = "torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 24))"
SMALL |= {"resnet18(num_classes=1024)": NETWORK, "range(100)": "range(2)", "max_epochs=100": "max_epochs=2, **QUIET"}
SMALL |= {'"cuda" if torch.cuda.is_available() else "cpu"': '"cpu"'}
QUIET = "QUIET = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False)\n"
QUIET += "QUIET |= dict(enable_checkpointing=False)\n"

# Lightning's Trainer once more, with what it is given written down: (step, epoch) of each batch, and its two views.
RESUMED = """
seen = []

class Noted(Pretraining):
    save_after = -1

    def training_step(self, batch, number):
        seen.append((batch.step, batch.epoch, [view.clone() for view in batch.views]))
        return super().training_step(batch, number)

    def on_train_batch_end(self, outputs, batch, number):
        if batch.step == self.save_after:
            self.trainer.save_checkpoint(sys.argv[2])

def fitted(epochs, path=None, **more):
    seen.clear()
    trainer = lightning.Trainer(max_epochs=epochs, **(QUIET | more))
    trainer.fit(Noted(), ckpt_path=path, weights_only=False)
    return trainer, list(seen)

def steps(noted):
    return [(step, epoch) for step, epoch, _ in noted]

_, all_steps = fitted(3)
assert steps(all_steps) == [(step, step // 3) for step in range(9)], steps(all_steps)
with make_loader(config) as loader:
    for (_, _, views), batch in zip(all_steps, loader.batches(0, 9), strict=True):
        assert all(torch.equal(view, own) for view, own in zip(views, batch.views, strict=True))

_, limited = fitted(3, limit_train_batches=2)
assert steps(limited) == [(0, 0), (1, 0), (3, 1), (4, 1), (6, 2), (7, 2)], steps(limited)

trainer, _ = fitted(2)
trainer.save_checkpoint(sys.argv[2])
_, after = fitted(3, sys.argv[2])
assert steps(after) == [(6, 2), (7, 2), (8, 2)], steps(after)

Noted.save_after = 4
fitted(2)
Noted.save_after = -1
_, after = fitted(3, sys.argv[2])
assert steps(after) == [(5, 1), (6, 2), (7, 2), (8, 2)], steps(after)
"""


def readme_blocks() -> list[str]:
    """The README's loops, made small: plain PyTorch, lightly, Lightning."""
    section = (REPO / "pipeline" / "README.md").read_text().split("## In your own loop")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for written, small in SMALL.items():
        assert any(written in block for block in blocks)
        blocks = [block.replace(written, small) for block in blocks]
    return blocks


def in_a_child(code: str, *arguments: Path) -> None:
    """Its own process: what other packages warn of when they are imported is not this project's matter."""
    command = [sys.executable, "-W", "ignore", "-c", f"import sys\n{code}", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_readmes_loops(small_beton):
    """They train; and the loss written out there is lightly's, which is an implementation of its own."""
    plain, lightly, trainer = readme_blocks()
    assert plain.count("\n") <= 22 and lightly.count("\n") <= 10
    changed = "before = {k: v.clone() for k, v in network.state_dict().items()}\n"
    checks = "assert loss.isfinite() and any((v != before[k]).any() for k, v in network.state_dict().items())\n"
    checks += "assert (batch.step, batch.epoch) == ({}), batch.step\n"
    same = "from lightly.loss import BarlowTwinsLoss\n"
    same += "whole = BarlowTwinsLoss(lambda_param=0.0051)(one, other)\n"
    same += "assert torch.allclose(whole, loss, rtol=1e-4), (whole, loss)\n"
    in_a_child(
        plain.replace("optimizer =", f"{changed}optimizer =")
        + same
        + checks.format("5, 1")
        + changed
        + lightly
        + checks.format("2, 0")
        + QUIET
        + trainer
        + "assert any((v != before[k]).any() for k, v in network.state_dict().items())\n",
        small_beton,
    )


@pytest.mark.slow
def test_lightnings_trainer_sees_every_epoch_once(small_beton, tmp_path):
    """With fewer batches an epoch, and resumed at the end and in the middle of one."""
    plain, _, trainer = readme_blocks()
    setup = (
        plain.split("with make_loader")[0] + "from lightly.loss import BarlowTwinsLoss\ncriterion = BarlowTwinsLoss()\n"
    )
    classes = trainer.split("lightning.Trainer")[0]
    in_a_child(setup + QUIET + classes + RESUMED, small_beton, tmp_path / "last.ckpt")


# ---- as a DataLoader ----


@pytest.fixture(params=["fast", "resident", "torch", pytest.param("ffcv", marks=pytest.mark.ffcv)])
def config(small_beton, request) -> LoaderConfig:
    """Paths as strings, and a single view."""
    backend = request.param
    return LoaderConfig(str(small_beton), ViewSpec(p_blur=1.0), 32, global_batch=16, workers=1, backend=backend)


def test_each_iteration_is_another_epoch(config):
    with make_loader(config) as loader:
        assert len(loader) == 3 and isinstance(loader, Iterable)
        epochs = [list(loader), list(loader)]
        assert [[batch.epoch for batch in epoch] for epoch in epochs] == [[0] * 3, [1] * 3]
        assert_same_batches(epochs[0] + epochs[1], list(loader.batches(0, 6)))
        assert len(epochs[0][0].views) == 1 and not torch.equal(epochs[0][0].views[0], epochs[1][0].views[0])
        for batch in loader:  # left in the middle, it counts all the same
            assert batch.epoch == 2
            break
        unused = iter(loader)
        loader.set_epoch(7)
        assert next(iter(loader)).epoch == 7 and next(unused).epoch == 8


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_iteration_continues_at_its_step(config, shuffle):
    config = replace(config, shuffle=shuffle, views=config.views if shuffle else CentreCrop(32))
    with make_loader(config) as loader:
        expected = [*loader, *loader]
    with make_loader(config) as loader:
        assert loader.state_dict() == {"step": 0}
        begun = iter(loader)
        first = [next(begun), next(begun)]
        state = loader.state_dict()
    with make_loader(config) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        loader.set_epoch(0)  # as Lightning does: the epoch that it is in already
        rest = [*loader, *loader]
    assert_same_batches(first + rest, expected)


def test_one_view_is_the_first_of_two(config):
    both = replace(config, views=[ViewSpec(p_blur=1.0), ViewSpec()])
    with make_loader(config) as one, make_loader(both) as two:
        assert torch.equal(next(iter(one)).views[0], next(iter(two)).views[0])


def test_two_passes_at_once(config):
    """The batches of one after the other; or the older pass ends with a sentence, and the newer one is whole."""
    with make_loader(config) as loader:
        alone = [list(loader.epoch(0)), list(loader.epoch(1))]
        passes = [loader.epoch(0), loader.epoch(1)]
        assert_same_batch(next(passes[0]), alone[0][0])
        assert_same_batch(next(passes[1]), alone[1][0])
        if config.backend in ("fast", "resident"):
            assert_same_batches(list(passes[0]), alone[0][1:])
        else:
            with pytest.raises(UserError, match="another pass was begun on this loader"):
                next(passes[0])
        assert_same_batches(list(passes[1]), alone[1][1:])


def test_used_after_it_was_closed(config):
    loader = make_loader(config)
    begun = iter(loader)
    next(begun)
    loader.close()
    for use in (begun, iter(loader), loader.epoch(0), loader.batches(0, 2)):
        with pytest.raises(UserError, match="this loader is closed; make another one with make_loader"):
            next(use)
    loader.close()


# ---- wrong arguments ----

# A field → wrong values, each with what the sentence says. Every field is here: the test looks.
NOT_A_SHARE = [(value, "a probability, 0 to 1") for value in (-0.1, 1.5, float("nan"), "half", None)]
NOT_A_STRENGTH = [(value, "a strength of 0 or more") for value in (-0.1, float("inf"), "strong")]
NOT_A_RANGE = [(value, r"expected \(least, most\), both above 0") for value in ((2, 1), (0, 1), (-1, 1), 0.5, (0.1,))]
NOT_WHOLE = [(value, "a whole number of") for value in (-1, 1.5, "32", True, None)]
WRONG_VIEW = {
    "area": [*NOT_A_RANGE, ((0.1, 1.5), "at most 1")],
    "ratio": NOT_A_RANGE,
    "interpolation": [("nearest", "bicubic or bilinear")],
    **{name: NOT_A_SHARE for name in ("p_flip", "p_jitter", "p_grey", "p_blur", "p_solarize")},
    **{name: NOT_A_STRENGTH for name in ("brightness", "contrast", "saturation")},
    "hue": [*NOT_A_STRENGTH, (0.6, "at most 0.5")],
    "sigma_px": NOT_A_RANGE,
}
WRONG_CROP = {"resize_px": [(0, "a whole number of"), *NOT_WHOLE], "interpolation": [("area", "bicubic or bilinear")]}
WRONG_NORMALIZATION = {
    "mean": [((0.5, 0.5), "three numbers"), (0.5, "three numbers"), ((123.7, 116.3, 103.5), "shares of 1, not of 255")],
    "std": [((0.2, 0.2, 0.0), "three numbers above 0"), (None, "three numbers")],
}
WRONG = {
    "data": [("none/train.beton", r"none/train\.beton is missing"), (5, "the path of a .beton"), ("", "the path")],
    "views": [
        *((value, "expected a ViewSpec, a tuple of them") for value in ((), [], "two", (ViewSpec(), "b"), None)),
        ((CentreCrop(),), "or a CentreCrop"),
    ],
    "resolution_px": [(0, "a whole number of 1 or more"), *NOT_WHOLE],
    "global_batch": [(0, "whole number of 1"), (49, r"larger than the dataset \(48 images\)"), *NOT_WHOLE],
    "seed": [(2**64, "64 bits"), *NOT_WHOLE],
    "shuffle": [("no", "True or False")],
    "check_bytes": [(1, "True or False")],
    "ids": [
        ([48], "ids go from 48 to 48; .* has 48 images, 0 to 47"),
        ([-1, 3], "ids go from -1 to 3"),
        ([*range(20), 3], "an id is there twice"),
        *((value, "one or more whole numbers in a row") for value in ([], [[1, 2]], [0.5], "all", np.ones(48, bool))),
    ],
    "blocks": [(Blocks(0, 2), "both 1 or more"), ((8, 2), "Blocks"), (8, "Blocks")],
    "on_bad_image": [("skip", "stop or substitute")],
    "resolutions": [
        (((5, 32), (0, 64)), "ascending"),
        (((0, 0),), "px"),
        (64, "first epoch, px"),
        ((64,), "first epoch"),
    ],
    "normalization": [(None, "a Normalization"), ((0.5, 0.5), "a Normalization")],
    "rank": [(1, "less than the world size, 1"), *NOT_WHOLE],
    "world_size": [(0, "whole number of 1"), (3, "not divisible by the world size 3"), *NOT_WHOLE],
    "backend": [("pil", "choose fast, ffcv, resident, torch or dali"), (None, "choose fast")],
    "workers": NOT_WHOLE,
    "device": [
        ("gpu", "choose cpu, cuda"),
        ("mps", "choose cpu, cuda"),
        (None, "choose cpu"),
        ("cuda:9", "is not here"),
    ],
    "views_on": [("tpu", "auto, cpu or gpu")],
    "view_type": [("float32", r"torch\.float32"), (torch.uint8, r"torch\.float32"), (None, "torch")],
}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ViewSpec, WRONG_VIEW),
        (CentreCrop, WRONG_CROP),
        (Squash, WRONG_CROP),
        (Normalization, WRONG_NORMALIZATION),
        (LoaderConfig, WRONG),
    ],
)
def test_every_wrong_argument_gets_a_sentence(small_beton, kind, wrong):
    assert wrong.keys() == {field.name for field in fields(kind)}
    right = {"data": small_beton, "views": BARLOW_TWINS_VIEWS, "resolution_px": 32, "global_batch": 16, "workers": 1}
    given = right if kind is LoaderConfig else {}
    for name, values in wrong.items():
        for value, says in values:
            with pytest.raises(UserError, match=says) as refused:
                made = kind(**(given | {name: value}))
                make_loader(made)
            assert "\n" not in str(refused.value)


def test_wrong_steps_and_epochs_get_a_sentence(config):
    with pytest.raises(UserError, match="make_loader was given 'train.beton'; expected a LoaderConfig"):
        make_loader("train.beton")
    with make_loader(config) as loader:
        for wrong in (-1, 0.5, "0", None, 2**63):
            for use in (loader.epoch, loader.set_epoch, lambda step: next(loader.batches(step, 2))):
                with pytest.raises(UserError, match="expected a whole number of 0 or more"):
                    use(wrong)
        with pytest.raises(UserError, match="the step to stop before is None"):
            next(loader.batches())


def test_what_is_right_is_taken(small_beton):
    """The borders of what is refused, and other types of the same numbers."""
    ViewSpec(area=(1.0, 1.0), ratio=(1, 1), p_flip=0, p_blur=np.float32(1), hue=0.5, brightness=0, sigma_px=[1e-3, 9])
    config = LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, np.int64(32), np.int32(48), workers=1, seed=2**64 - 1)
    with make_loader(replace(config, device=torch.device("cpu"))) as loader:
        assert len(next(iter(loader)).sample) == 48
    for ids in (range(3), [5, 3, 5], np.array([47], np.uint8), torch.arange(4)):
        with make_loader(replace(config, shuffle=False, ids=ids, views=CentreCrop(32))) as loader:
            assert [batch.sample.tolist() for batch in loader] == [[int(i) for i in ids]]


def test_stand_ins_and_a_pass_over_all(small_beton):
    with pytest.raises(UserError, match="views_on is 'gpu'; expected auto or cpu$"):
        LoaderConfig(small_beton, Squash(32), 32, 16, shuffle=False, views_on="gpu")
    with pytest.raises(UserError, match="on_bad_image is 'substitute'; expected stop, as shuffle=False"):
        LoaderConfig(small_beton, CentreCrop(32), 32, 16, shuffle=False, on_bad_image="substitute")
