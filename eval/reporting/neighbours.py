"""What kept features show: a map of them, the nearest training images of some others, the accuracy of each class.

Nothing is extracted and no checkpoint opened here: the features are those that eval/knn.py or eval/linear.py kept in
the run folder, of the very checkpoint and dataset that a result of theirs names.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from eval.kept import find_features
from eval.reporting.charts import Charts, scatter
from eval.reporting.facts import read_config
from eval.reporting.page import PARTS, Section, left_out, or_sentence, picture, whose
from eval.reporting.summary import newest_of_encoder
from eval.splits import Dataset, open_dataset
from pipeline.command import DATA
from pipeline.errors import UserError
from pipeline.storage.beton import Stored
from pipeline.storage.decode_pil import decode_pil
from train.knn_vote import inverse_lengths, knn_votes, label_ranks, nearest
from train.run_data import dataset_sha256

MAP_IMAGES, MAP_CLASSES = 600, 10
QUERIES, SHOWN = 6, 8  # images whose neighbours are shown, and how many of them
VOTERS = 20  # the k of the headline nearest-neighbour accuracy
MULTIPLICATIONS = {"cpu": 6e10, "cuda": 5e13}  # a few seconds' worth of similarities
CHUNK = 256
FEWEST_A_CLASS = 5
MOST_CLASSES = 40  # that are listed one by one; of more, the best and the worst
EQUAL = 1e-10  # a mean squared distance of unit-length features below this is float32's rounding


@dataclass(frozen=True)
class KeptFeatures:
    """Features of a dataset's splits, (N, D) and (M, D) of the type they were kept in, and a result made of them."""

    result: dict
    dataset: Dataset
    val: torch.Tensor
    train: torch.Tensor | None


def kept_features(run: Path, results: list[dict], data: Path | None = None) -> KeptFeatures:
    """What the evaluations kept of the checkpoint of the run's newest result. `data` None: what it was measured on.

    Raises UserError where there is no such result, no dataset, or no features of its val part.
    """
    newest = newest_of_encoder(results)
    own = [r for r in results if newest and of_checkpoint(r) == of_checkpoint(newest)]
    own = [r for r in own if r["protocol"].startswith(("knn", "linear"))]
    if not own:
        raise UserError("there is no kNN or linear result, whose features are shown; `python eval/knn.py` measures one")
    result = own[-1]
    dataset = open_dataset(data or data_of(run, result))
    if data is None and dataset.sha256() != result["dataset_sha256"]:
        raise UserError(
            f"{dataset.train.path.parent} has other images than {result['protocol']} was measured on; "
            "name those with --data, or measure again"
        )
    val = _kept(run, result, dataset.val)
    if val is None:
        raise UserError(
            f"no features of {dataset.val.path} are kept in {run}; `python eval/knn.py --checkpoint "
            f"{result['checkpoint']}` keeps them"
        )
    return KeptFeatures(result, dataset, val, _kept(run, result, dataset.train))


def of_checkpoint(result: dict) -> tuple[str, str]:
    """Which network a result is of: the file's digest and which of its networks."""
    return result["checkpoint_sha256"], result.get("key", "")


def data_of(run: Path, result: dict) -> Path:
    """Where a result's images are; older results do not say, but the run's configuration does."""
    if "data" in result:
        return Path(result["data"])
    config = read_config(run)
    return config.data if config else DATA / "imagenet"


def _kept(run: Path, result: dict, beton: Stored) -> torch.Tensor | None:
    """Features of a whole split, of whatever type and loader."""
    sha256, key = of_checkpoint(result)
    return find_features(
        run / "features",
        checkpoint_sha256=sha256,
        key=key,
        dataset_sha256=dataset_sha256(beton),
        ids_sha256="all",
        resolution_px=result["resolution_px"],
    )


def refuse_equal(rows: torch.Tensor) -> None:
    """Raises UserError for unit-length features (n, D) that are the same up to rounding.

    No image is then nearer than another, and t-SNE divides by their deviation of 0 and crashes the process.
    """
    if (rows - rows.mean(0)).square().sum(1).mean() < EQUAL:
        raise UserError(f"the features of all {len(rows)} validation images are equal: the encoder has collapsed")


def embedding_map(kept: KeptFeatures) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """t-SNE of val features: (n, 2), labels (n,) into the names returned. At most MAP_CLASSES classes, spread evenly.

    scikit-learn's, of the unit-length features' 50 principal components, perplexity 30, a fixed seed.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    labels = kept.dataset.val_labels
    present = np.unique(labels)
    classes = present[np.unique(np.linspace(0, len(present) - 1, MAP_CLASSES).round().astype(int))]
    each = MAP_IMAGES // len(classes)
    ids = np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes])
    if len(ids) < 10:
        raise UserError(f"{len(ids)} validation images are too few for a map of their features")
    rows = normalize(kept.val[torch.from_numpy(ids)].float(), dim=1)
    refuse_equal(rows)
    with threadpool_limits(1):  # so few rows: waking the other threads takes longer, on a busy machine three times
        components = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows.numpy())
        tsne = TSNE(perplexity=min(30, len(ids) / 4), init="pca", max_iter=500, random_state=0)
        places = tsne.fit_transform(components)
    return places, np.searchsorted(classes, labels[ids]), [kept.dataset.train.classes[c] for c in classes]


@dataclass(frozen=True)
class Vote:
    """The nearest training images of each query, a val image, and whether their vote hits. Rows (n, VOTERS), sorted."""

    queries: np.ndarray
    rows: np.ndarray
    similarity: np.ndarray
    hits: np.ndarray


@torch.no_grad()
def vote(kept: KeptFeatures) -> Vote:
    """The nearest-neighbour vote of as many val images, evenly spread, as a few seconds allow."""
    train, val = kept.train, kept.val
    if train is None:
        raise UserError("features of the training images are not kept; `python eval/knn.py` keeps them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = max(QUERIES, int(MULTIPLICATIONS[device] / train.numel()))
    queries = np.unique(np.linspace(0, len(val) - 1, min(most, len(val))).round().astype(np.int64))
    refuse_equal(normalize(val[torch.from_numpy(queries)].float(), dim=1))
    train, scale = train.to(device), inverse_lengths(train).to(device)
    labels = torch.from_numpy(kept.dataset.train.labels).to(device)
    own = torch.from_numpy(kept.dataset.val_labels[queries]).to(device)
    parts = []
    for start in range(0, len(queries), CHUNK):
        chunk = val[torch.from_numpy(queries[start : start + CHUNK])].to(device).float()
        similarity, rows = nearest(train, scale, normalize(chunk, dim=1), VOTERS)
        votes = knn_votes(similarity, labels[rows], len(kept.dataset.train.classes))
        hits = label_ranks(votes, own[start : start + CHUNK]) == 0
        parts.append([part.cpu().numpy() for part in (rows, similarity, hits)])
    return Vote(queries, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def class_accuracy(kept: KeptFeatures, found: Vote) -> dict[str, float]:
    """Percent of each class's queries that the vote hits, best first; classes without val images are left out."""
    labels = kept.dataset.val_labels[found.queries]
    if len(labels) < FEWEST_A_CLASS * len(np.unique(labels)):
        raise UserError(
            f"nearest neighbours of {len(labels)} validation images were affordable here, too few for "
            f"{len(np.unique(labels))} classes; a GPU would do"
        )
    accuracy = {kept.dataset.train.classes[c]: 100 * found.hits[labels == c].mean() for c in np.unique(labels)}
    return dict(sorted(accuracy.items(), key=lambda item: -item[1]))


def shown_queries(kept: KeptFeatures, found: Vote) -> list[int]:
    """Positions among the queries of QUERIES images, each of another class where there are as many, spread evenly."""
    labels = kept.dataset.val_labels[found.queries]
    firsts = np.sort(np.unique(labels, return_index=True)[1])
    firsts = firsts[np.argsort(labels[firsts])]
    return [int(firsts[i]) for i in np.unique(np.linspace(0, len(firsts) - 1, QUERIES).round().astype(int))]


def feature_map(kept: KeptFeatures, charts: Charts) -> str:
    """A point for each of some validation images, near to those with like features."""
    places, labels, names = embedding_map(kept)
    drawn = scatter(places, labels, names, charts)
    return PARTS.feature_map(drawn, len(places), names, len(kept.dataset.train.classes), whose(kept.result))


def shown_neighbours(kept: KeptFeatures, found: Vote) -> str:
    """Rows of pictures: a validation image, then its nearest training images."""
    train, val, classes = kept.dataset.train, kept.dataset.val, kept.dataset.train.classes

    def shown(kind: str, beton: Stored, sample: int, caption: str) -> tuple:
        return kind, picture(decode_pil(beton, sample), caption, 160), caption

    rows = []
    for query in shown_queries(kept, found):
        sample = int(found.queries[query])
        label = kept.dataset.val_labels[sample]
        row = [shown("query", val, sample, classes[label])]
        for near, similarity in zip(found.rows[query, :SHOWN], found.similarity[query, :SHOWN], strict=True):
            kind = "hit" if train.labels[near] == label else "miss"
            row.append(shown(kind, train, int(near), f"{classes[train.labels[near]]} {similarity:.2f}"))
        rows.append(row)
    return PARTS.neighbours(rows, whose(kept.result))


def classes_accuracy(kept: KeptFeatures, found: Vote) -> str:
    """A bar for each class, or for the best and the worst of many."""
    accuracy = list(class_accuracy(kept, found).items())
    return PARTS.bars(accuracy, MOST_CLASSES, VOTERS, len(found.queries), len(kept.val), whose(kept.result))


def of_kept_features(run: Path, own: list[dict], data: Path | None, charts: Charts) -> list[Section]:
    """The sections made of kept features; one that says why where there are none."""
    try:
        kept = kept_features(run, own, data)
    except UserError as error:
        return [left_out("Features", error)]
    parts = [or_sentence("Map of the features", lambda: feature_map(kept, charts))]
    try:
        found = vote(kept)
    except UserError as error:
        return [*parts, left_out("Nearest neighbours", error)]
    parts.append(or_sentence("Nearest neighbours", lambda: shown_neighbours(kept, found)))
    return [*parts, or_sentence("Accuracy of each class", lambda: classes_accuracy(kept, found))]
