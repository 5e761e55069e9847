"""The weighted nearest-neighbour vote (Wu 2018): pure functions of tensors.

For the trainer's own record (online_knn.py) and the evaluations' protocols (eval/metrics.py).
"""

import torch
from torch.nn.functional import normalize

KNN_TEMPERATURE = 0.07  # Wu 2018, section 3.4
KNN_NEIGHBOURS = (10, 20, 100, 200)
KNN_HEADLINE = 20  # the k whose accuracy is told first, fixed beforehand
QUERY_CHUNK = 256  # the similarities held at once: at most QUERY_CHUNK × BANK_CHUNK float32, 128 MiB
BANK_CHUNK = 131_072


def label_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The place of each label among its row's scores, 0 = highest: (B, K), (B,) → (B,) int64.

    Equal scores rank in the order of their classes, so a prediction of all-equal scores names class 0 and
    no more. A row with a score that is not finite ranks its label last.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return torch.where(scores.isfinite().all(1), ranks, scores.shape[1])


def inverse_lengths(features: torch.Tensor) -> torch.Tensor:
    """1 / ‖row‖, (N, D) of any float type → (N,) float32. A row of zeros gets a large number, and so stays zero."""
    return torch.cat([1 / part.float().norm(dim=1).clamp(min=1e-12) for part in features.split(BANK_CHUNK)])


def nearest(
    bank: torch.Tensor, scale: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of `scale` (N,) × dot product: (N, D), (B, D) → similarities and bank rows, (B, k), sorted.

    Exact. The bank goes through in pieces and is never copied, so memory does not grow with N.
    """
    best = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK_CHUNK):
        piece = slice(start, start + BANK_CHUNK)
        similarity = (queries @ bank[piece].float().T).mul_(scale[piece])
        values, columns = similarity.topk(min(k, similarity.shape[1]), dim=1, sorted=False)
        best, rows = torch.cat([best, values], 1), torch.cat([rows, columns + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return best, rows


def knn_votes(similarity: torch.Tensor, neighbour_labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Each neighbour votes for its class with weight exp(similarity / T): (B, k), (B, k) → (B, K)."""
    weights = (similarity / KNN_TEMPERATURE).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, neighbour_labels, weights)


@torch.no_grad()
def knn_ranks(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    classes: int,
    neighbours: tuple[int, ...] = KNN_NEIGHBOURS,
) -> dict[int, torch.Tensor]:
    """The rank of each query's label in the vote of its k nearest, for every k: {k: (M,) int64}.

    `bank` (N, D) and `queries` (M, D) are features of any float type and length; the similarity is the cosine.
    A k above N is left out. A class without a vote is never a hit.
    """
    neighbours = tuple(k for k in neighbours if k <= len(bank))
    scale = inverse_lengths(bank)
    ranks: dict[int, list[torch.Tensor]] = {k: [] for k in neighbours}
    for start in range(0, len(queries) if neighbours else 0, QUERY_CHUNK):
        chunk = normalize(queries[start : start + QUERY_CHUNK].float(), dim=1)
        labels = query_labels[start : start + QUERY_CHUNK]
        similarity, rows = nearest(bank, scale, chunk, max(neighbours))
        for k in neighbours:
            votes = knn_votes(similarity[:, :k], bank_labels[rows[:, :k]], classes)
            voted = votes.gather(1, labels[:, None])[:, 0] > 0
            ranks[k].append(torch.where(voted, label_ranks(votes, labels), classes))
    return {k: torch.cat(parts) for k, parts in ranks.items() if parts}
