"""Nearest-neighbour accuracy of a frozen encoder: no training at all.

    python eval/knn.py                                     the newest run, on the data it was trained on
    python eval/knn.py --checkpoint runs/NAME --data DIR   another run, another dataset
    python eval/knn.py --features pixels                   the control: raw pixels instead of the encoder

Protocol knn-mmselfsup: features of centre views, cosine similarity, the k nearest training images vote with weight
exp(similarity / 0.07), k = 10, 20, 100, 200. The headline is k = 20, fixed beforehand; the line has them all.
"""

from dataclasses import dataclass

from eval.metrics import knn_accuracy
from eval.protocols import KNN
from eval.subject import SubjectConfig, open_subject, record_result
from pipeline.command import run_command
from pipeline.errors import UserError
from train.knn_vote import KNN_HEADLINE


@dataclass(frozen=True)
class KnnConfig(SubjectConfig):
    """Nearest-neighbour evaluation. --fraction is the share of the training images that may vote."""


def main(config: KnnConfig) -> dict:
    """Measures and records; returns the result's line. Raises UserError."""
    subject = open_subject(config)
    if subject.subset.images < KNN_HEADLINE:
        share = f"--shots {config.shots}" if config.shots else f"--fraction {config.fraction:g}"
        raise UserError(
            f"{subject.dataset.train.path} offers {subject.subset.images} training images at {share}, at least "
            f"{KNN_HEADLINE} are needed to vote; give a larger number there, or a larger dataset"
        )
    by_k = knn_accuracy(
        subject.train_features(), subject.train_labels(), subject.val_features(), subject.val_labels(), subject.classes
    )
    values = {f"{name}_k{k}": value for k, accuracy in by_k.items() for name, value in accuracy._asdict().items()}
    return record_result(subject, KNN, settings=KNN.with_flags(config), values=values)


if __name__ == "__main__":
    run_command(KnnConfig, main)
