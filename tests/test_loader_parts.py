"""The loader made of parts: the decoder that pipeline/README.md shows, and what every loader offers."""

import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.loaders.parts import PartsLoader, ahead_of
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, LoaderConfig
from tests.support import assert_same_batch

README = Path(__file__).resolve().parents[1] / "pipeline" / "README.md"


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, 64, global_batch=16, seed=5, workers=2)


@pytest.fixture(scope="module")
def new_decoder() -> type:
    """The class in the README, as a reader would copy it."""
    (code,) = re.findall(r"```python\n(import io\n.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names["PillowPixels"]


def test_the_decoder_of_the_readme_has_the_batches_of_the_fast_one(config, new_decoder):
    with PartsLoader(config, new_decoder) as theirs, make_loader(config) as ours:
        for one, other in zip(theirs.batches(1, 5), ours.batches(1, 5), strict=True):
            assert_same_batch(one, other)


def test_a_new_decoder_needs_nothing_for_a_short_or_empty_last_batch(config, new_decoder):
    ids = np.array([40, 3, 3, 17, 8])
    config = replace(config, shuffle=False, views=CentreCrop(72), global_batch=4, ids=ids, rank=1, world_size=2)
    for make in (lambda: PartsLoader(config, new_decoder), lambda: make_loader(config)):
        with make() as loader:
            assert [batch.sample.tolist() for batch in loader.epoch()] == [[3, 17], []]
            (last,) = list(loader.batches())[-1].views
            assert last.shape == (0, 3, 64, 64) and last.is_contiguous(memory_format=torch.channels_last)


def test_epochs_are_the_batches_from_step_to_step(config):
    with make_loader(replace(config, data=str(config.data))) as loader:
        assert len(loader) == loader.steps_per_epoch == 3
        batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        assert [(batch.step, batch.epoch) for batch in batches] == [(s, s // 3) for s in range(6)]
        for one, other in zip(batches, loader.batches(0, 6), strict=True):
            assert_same_batch(one, other)


def test_a_loader_is_closed_at_the_end_of_its_context(config):
    with pytest.raises(ZeroDivisionError), make_loader(config) as loader:
        next(loader.epoch(1))
        raise ZeroDivisionError
    with pytest.raises(UserError, match="this loader is closed; make another"):
        next(loader.epoch(1))


def test_a_loader_that_nobody_has_is_let_go(config):
    loader = make_loader(config)
    next(loader.epoch())
    kept = weakref.ref(loader)
    del loader
    gc.collect()
    assert kept() is None


def test_work_is_begun_in_advance():
    begun = []

    def begin():
        for number in range(5):
            begun.append(number)
            yield number

    passed_on = []
    for number in ahead_of(2, begin()):
        assert len(begun) == min(number + 3, 5)
        passed_on.append(number)
    assert passed_on == list(range(5))
