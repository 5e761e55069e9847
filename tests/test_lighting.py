"""The training views of heads-mmselfsup: MMSelfSup's chain, by torchvision's own transforms with the same draws."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms

from eval.protocols import HEADS
from eval.subject import SubjectConfig, open_subject
from eval.supervised import training_view, with_lighting
from pipeline.choices.draws import BRIGHTNESS, CONTRAST, NOTHING, SATURATION, ViewParams, draw_views
from pipeline.choices.lighting import draw_lighting
from pipeline.spec import Batch
from pipeline.storage.beton import open_beton
from tests.evaluation import NORMALIZATION, write_run
from tests.philox import philox4x32_array

STRENGTH = 0.1
# Copied by hand from MMSelfSup v0.9.0, mmselfsup/datasets/pipelines/transforms.py, lines 384 to 392.
EIGVAL = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
EIGVEC = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], dtype=torch.float64
)


def weights(seed: int, epoch: int, samples) -> np.ndarray:
    """(B, 3) standard normal numbers: Box and Muller's formula on the second Philox, domain 5, block 0, view 0."""
    counter = [(0, 5 << 16, sample, epoch) for sample in samples]
    u = philox4x32_array(np.uint32(counter), np.uint32([seed & 0xFFFFFFFF, seed >> 32])) / 2.0**32
    first, second = np.sqrt(-2 * np.log1p(-u[:, 0])), np.sqrt(-2 * np.log1p(-u[:, 2]))
    turns = 2 * np.pi * u
    return np.stack([first * np.cos(turns[:, 1]), first * np.sin(turns[:, 1]), second * np.cos(turns[:, 3])], 1)


class Lighting(torch.nn.Module):
    """MMSelfSup's `Lighting` as its lines 406 to 412 define it, in float64, with a given alpha in place of a draw."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64)

    def forward(self, image):
        return image.double() + ((EIGVEC * self.alpha) * EIGVAL).sum(1)[:, None, None]


def chain(p: ViewParams, b: int, side: int, alpha) -> transforms.Compose:
    """v0.9.0's resnet50_mhead_linear-8xb32-steplr-90e_in1k.py, lines 13 to 25; each transform gets image b's draws."""
    crop = transforms.RandomResizedCrop(side)
    crop.get_params = lambda *_: tuple(int(a[b, 0]) for a in p[:4])
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0)
    # torchvision numbers the operations as we do, and draws a place for the hue which it then passes over.
    order = [3 if operation == NOTHING else int(operation) for operation in p.jitter_order[b, 0]]
    factors = [float(a[b, 0]) for a in (p.brightness, p.contrast, p.saturation)]
    assert jitter.hue is None and sorted(order) == [0, 1, 2, 3]
    jitter.get_params = lambda *_: (torch.tensor(order), *factors, None)
    flip = transforms.RandomHorizontalFlip(float(p.flip[b, 0]))
    normalize = transforms.Normalize(NORMALIZATION.mean, NORMALIZATION.std)
    return transforms.Compose([crop, flip, jitter, transforms.ToTensor(), Lighting(alpha), normalize])


@pytest.fixture
def subject(small_beton, tmp_path):
    for split in ("train", "val"):
        for end in ("beton", "manifest.json", "files.tsv"):
            (tmp_path / f"{split}.{end}").symlink_to(small_beton.with_name(f"train.{end}"))
    run = write_run(tmp_path / "run", tmp_path)
    return open_subject(SubjectConfig(checkpoint=run, data=tmp_path, seed=3, resolution=48, workers=1))


@pytest.mark.parametrize("backend", ["fast", pytest.param("torch", marks=pytest.mark.slow)])
def test_the_training_views_are_mmselfsups(subject, small_beton, backend):
    subject = replace(subject, config=replace(subject.config, loader=backend))
    settings, beton = HEADS.settings, open_beton(small_beton)
    with subject.augmented_loader(4, training_view(settings)) as loader:
        batches = list(with_lighting(loader.batches(11, 13), subject, settings["lighting"]))  # two epochs
    assert [batch.epoch for batch in batches] == [0, 1]
    names = beton.file_names()
    for batch in batches:
        ids = batch.sample.numpy()
        p = draw_views(3, batch.epoch, ids, beton.heights[ids], beton.widths[ids], (training_view(settings),), 48)
        alphas = STRENGTH * weights(3, batch.epoch, ids)
        for b, view in enumerate(batch.views[0]):
            image = Image.open(small_beton.parent / "images" / names[ids[b]]).convert("RGB")
            expected = chain(p, b, 48, alphas[b])(image)
            assert (view.double() - expected).abs().max() < 2e-6
            unlit = chain(p, b, 48, np.zeros(3))(image)
            assert (expected - unlit).abs().max() > 1e-3, "the case decides nothing"


def test_the_orders_of_the_three_are_uniform():
    """torchvision orders all four and passes over the hue: each of the six orders of the others has a sixth."""
    ids, size = np.arange(60_000), np.full(60_000, 64)
    p = draw_views(1, 0, ids, size, size, (training_view(HEADS.settings),), 32)
    assert p.jitter.all() and not p.grey.any() and not p.hue.any()
    orders = p.jitter_order[:, 0]
    three = orders[orders != NOTHING].reshape(-1, 3)
    kinds = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION)))
    counts = [int((three == kind).all(1).sum()) for kind in kinds]
    assert sum(counts) == len(ids) and stats.chisquare(counts).pvalue > 1e-4
    for factor in (p.brightness, p.contrast, p.saturation):
        assert stats.kstest(factor[:, 0], stats.uniform(0.6, 0.8).cdf).pvalue > 1e-4


def test_offsets_are_the_formula_on_the_projects_counters():
    ids = np.array([0, 7, 1_281_166])
    for seed, epoch in ((0, 0), (2**40 + 3, 89)):
        expected = (EIGVEC.numpy() @ (EIGVAL.numpy()[:, None] * STRENGTH * weights(seed, epoch, ids).T)).T
        ours = draw_lighting(seed, epoch, ids, STRENGTH)
        assert ours.dtype == np.float32 and np.allclose(ours, expected, atol=1e-8)
        assert np.array_equal(draw_lighting(seed, epoch, ids[1:], STRENGTH), ours[1:]), "one sample's do not see others"
    drawn = [draw_lighting(*where, ids, STRENGTH) for where in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(row) for rows in drawn for row in rows}) == 9


def test_the_weights_are_normal_and_independent():
    offsets = draw_lighting(5, 2, np.arange(100_000), STRENGTH).astype(np.float64)
    drawn = np.linalg.solve(EIGVEC.numpy() * EIGVAL.numpy(), offsets.T) / STRENGTH
    for component in drawn:
        assert stats.kstest(component, "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 4 / np.sqrt(100_000)


def test_noise_keeps_layout_and_type(subject):
    views = (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),)
    batch = Batch(views, torch.zeros(2, dtype=torch.int64), torch.tensor([5, 1]), 0, 0)
    ((view,), *_) = next(with_lighting([batch], subject, STRENGTH))
    assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
    expected = draw_lighting(3, 0, np.array([5, 1]), STRENGTH) / np.float32(NORMALIZATION.std)
    assert np.array_equal(view[:, :, 0, 0].numpy(), expected.astype(np.float32))
