"""How well detections fit: COCO's averages by pycocotools, and PASCAL VOC's by its development kit's own rule.

Detections are in COCO's results form: {"image_id", "category_id", "bbox": [x, y, width, height], "score"} and, for
masks, "segmentation" as run lengths.
"""

import contextlib
import io

import numpy as np
from torch import from_numpy
from torchvision.ops import box_iou

from eval.detector.data import Split
from eval.metrics import eleven_point_mean

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


def coco_scores(truth: dict, detections: list[dict], kind: str) -> dict[str, float]:
    """AP, AP50 and AP75 in percent by pycocotools; `kind` "bbox" or "segm". No detection at all scores 0."""
    if not detections:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Copies, because pycocotools writes into them; and with a box it would take the box's area for the mask's.
    dropped = {"bbox"} if kind == "segm" else set()
    detections = [{name: value for name, value in d.items() if name not in dropped} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and a table
        known = COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats[:3], strict=True)}


def voc_scores(split: Split, detections: list[dict]) -> dict[str, float]:
    """AP, AP50 and AP75 in percent as Detectron2 measures VOC 2007: 11-point average precision, mean over classes.

    AP is the mean over IoU thresholds 0.5, 0.55 … 0.95. A detection goes to the object it overlaps most; beyond the
    threshold it hits that object once, is wrong the second time, and does not count where the object is difficult.
    Classes without objects in the split are left out.
    Source: Everingham 2010, section 4.2; detectron2/evaluation/pascal_voc_evaluation.py.
    """
    by_label: dict[int, list[dict]] = {}
    for detection in detections:
        by_label.setdefault(detection["category_id"], []).append(detection)
    present = sorted({int(label) for r in split.records for label in r.labels[~r.ignored]})
    precision = np.array([class_precision(split, label, by_label.get(label, [])) for label in present])
    means = 100 * precision.mean(0)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def class_precision(split: Split, label: int, detections: list[dict]) -> np.ndarray:
    """One class's 11-point average precision at each of IOU_THRESHOLDS: (10,)."""
    objects = {r.image_id: np.flatnonzero(r.labels == label) for r in split.records}
    records = {r.image_id: r for r in split.records}
    positives = sum(int((~records[i].ignored[own]).sum()) for i, own in objects.items())
    detections = sorted(detections, key=lambda d: -d["score"])  # stable: equal scores keep their order
    best, nearest = np.zeros(len(detections)), np.full(len(detections), -1)
    for i, detection in enumerate(detections):
        own = objects[detection["image_id"]]
        if len(own):
            x, y, width, height = detection["bbox"]
            box = np.array([[x, y, x + width, y + height]], np.float64)
            overlap = box_iou(from_numpy(box), from_numpy(records[detection["image_id"]].boxes[own].astype(np.float64)))
            best[i], at = overlap[0].max(0)
            nearest[i] = own[at]
    return np.array([_average(detections, records, best, nearest, t, positives) for t in IOU_THRESHOLDS])


def _average(detections, records, best, nearest, threshold, positives) -> float:
    right, wrong, taken = np.zeros(len(detections)), np.zeros(len(detections)), set()
    for i, detection in enumerate(detections):
        image, own = detection["image_id"], nearest[i]
        if best[i] <= threshold or (image, own) in taken:
            wrong[i] = 1
        elif not records[image].ignored[own]:
            right[i] = 1
            taken.add((image, own))
    hits = np.cumsum(right)
    return eleven_point_mean(hits, hits + np.cumsum(wrong), positives)
