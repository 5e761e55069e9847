"""What the page shows of the loss: the run's own images and views, and their correlation matrix against NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.reporting import correlation
from eval.reporting.correlation import correlate, load_method
from pipeline.choices.draws import draw_views
from pipeline.choices.order import shuffled_batches
from pipeline.constants import CIFAR10_MEAN, CIFAR10_STD
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.storage.beton import open_beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.views.reference import apply_view_pil
from tests.evaluation import write_dataset, write_state
from train.checkpoint import newest_or_refuse
from train.distributed import Ranks
from train.methods.choose import view_table
from train.run_data import loader_config

IMAGES = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("correlation")
    write_state(root / "run", write_dataset(root / "data"))
    return root / "run"


def test_correlation_against_numpy(run):
    """The matrix of the fast loader's views is float64's Pearson correlation of the PIL loader's, to their rounding."""
    found = correlate(run)
    method, config = load_method(newest_or_refuse(run))
    beton, views = open_beton(run.parent / "data" / "train.beton"), view_table(config)
    _, epoch, ids = next(shuffled_batches(config.seed, np.arange(IMAGES), 128, 0, 1, 0, 1))
    params = draw_views(config.seed, epoch, ids, beton.heights[ids], beton.widths[ids], views, 32)
    mean, std = (np.array(v) for v in (CIFAR10_MEAN, CIFAR10_STD))
    z = []
    for v, view in enumerate(views):
        made = [apply_view_pil(decode_pil(beton, i), params, b, v, view.interpolation, 32) for b, i in enumerate(ids)]
        pixels = (np.stack([np.asarray(image) for image in made]) / 255 - mean) / std
        with torch.no_grad():
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
            z.append(method.projector(method.backbone(inputs)).double().numpy())
    expected = np.corrcoef(*z, rowvar=False)[:16, 16:]
    assert found.images == 128 and found.matrix.shape == (16, 16)
    np.testing.assert_allclose(found.matrix, expected, atol=2e-4)
    off = expected[~np.eye(16, dtype=bool)]
    assert found.diagonal_mean == pytest.approx(expected.diagonal().mean(), abs=1e-4)
    assert found.off_diagonal_rms == pytest.approx(np.sqrt((off**2).mean()), abs=1e-4)
    shown = np.stack([np.stack(pair) for pair in found.pairs])
    assert shown.shape == (8, 2, 32, 32, 3) and len({s.tobytes() for s in shown.reshape(16, -1)}) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"fraction": 0.7, "without": ("crop", "grey"), "loader": "dali"},
        {"order": "blocks", "block_images": 4, "window_blocks": 5, "loader": "torch", "workers": 3},
        {"resolution_schedule": "16@0,32@1", "views_on": "gpu", "on_bad_image": "substitute"},
    ],
)
def test_correlation_sees_the_runs_first_batches(run, tmp_path, monkeypatch, changes):
    """Sample for sample and pixel for pixel what the trainer's own loader begins with, at one rank."""
    config, seen = write_state(tmp_path / "run", run.parent / "data", **changes), []

    def watched(loading):
        assert (loading.backend, loading.on_bad_image) == ("fast", config.on_bad_image)
        loader = make_loader(loading)
        batches = loader.batches
        loader.batches = lambda *steps: (seen.append(batch) or batch for batch in batches(*steps))
        return loader

    monkeypatch.setattr(correlation, "make_loader", watched)
    monkeypatch.setattr(correlation, "BATCH", 50)
    found = correlate(tmp_path / "run")
    config = replace(config, loader="fast", views_on="auto")
    loader = make_loader(loader_config(config, Ranks(0, 1, torch.device("cpu"), None)))
    try:
        (first,) = loader.batches(0, 1)
    finally:
        loader.close()
    samples = torch.cat([batch.sample for batch in seen])
    assert found.images == len(samples) == 100 and torch.equal(samples, first.sample[:100])
    for v in (0, 1):
        assert torch.equal(torch.cat([batch.views[v] for batch in seen]), first.views[v][:100])


def test_correlation_of_other_images_is_not_shown(run, tmp_path):
    write_state(tmp_path / "run", run.parent / "data", images_sha256="ab" * 32)
    with pytest.raises(UserError, match="was trained on the images of .*holds other ones"):
        correlate(tmp_path / "run")
