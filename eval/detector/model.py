"""Faster and Mask R-CNN on the C4 body of a ResNet, from torchvision's parts, as Detectron2 and MoCo set them up.

    image ── conv1 … layer3 ──▶ features, stride 16 ──▶ region proposals
                                      │                      │
                                      └── RoIAlign 14 × 14 ◀─┘ ── layer4, batch norm ──▶ mean ──▶ class and box
                                                                          └─▶ deconvolution ──▶ mask 14 × 14

Every batch norm trains, with the statistics of the global batch; the one after layer4 is MoCo's (He 2020, appendix
A.1: "an extra BN layer after the res5 stage"). Settings: facebookresearch/moco, detection/configs, on Detectron2's
Base-RCNN-C4. What differs from Detectron2: smooth L1 with β = 1/9 where it has L1, bilinear resizing by torch
instead of Pillow, padding to the batch's largest image without grouping by aspect ratio.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign

from pipeline.errors import UserError
from pipeline.spec import Normalization

ANCHOR_SIDES_AT_800_PX = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
ROI_PX = 14  # before layer4 halves it
LONGEST_SHARE = 1333 / 800  # longest side an image may get, over the shorter one's
STAGES = ("layer1", "layer2", "layer3")


class C4Body(nn.Module):
    """A ResNet up to layer3 under its own parameter names: (B, 3, H, W) → (B, out_channels, H / stride, W / stride)."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, resnet.maxpool
        self.relu = resnet.relu if hasattr(resnet, "relu") else resnet.act1  # torchvision's name, timm's name
        for name in STAGES:
            setattr(self, name, getattr(resnet, name))
        with torch.no_grad():
            self.eval()
            probe = self(torch.zeros(1, 3, 64, 64))
        self.out_channels, self.stride = probe.shape[1], 64 // probe.shape[2]

    def forward(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in STAGES:
            x = getattr(self, name)(x)
        return x


class C4Heads(RoIHeads):
    """torchvision's RoIHeads with one layer4 for classes, boxes and masks.

    In training the masks take layer4's output of the positive proposals from that of all: a second pass would
    give batch norm other statistics.
    """

    def __init__(self, align: RoIAlign, stage: nn.Module, channels: int, classes: int, masks: bool, rois: int):
        super().__init__(
            None,
            None,
            FastRCNNPredictor(channels, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_predictor=MaskRCNNPredictor(channels, 256, classes) if masks else None,
        )
        self.align, self.layer4, self.norm = align, stage, nn.BatchNorm2d(channels)
        for layer, deviation in ((self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def has_mask(self) -> bool:
        """As RoIHeads asks it."""
        return self.mask_predictor is not None

    def region_features(self, features, proposals):
        """Boxes of each image, in px → (all boxes, channels, 7, 7)."""
        return self.norm(self.layer4(self.align(features, proposals)))

    def forward(self, features, proposals, image_shapes, targets=None):
        features = features["0"]
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        x = self.region_features(features, proposals)
        loss_class, loss_box = fastrcnn_loss(*self.box_predictor(x.mean((2, 3))), labels, box_targets)
        losses = {"loss_class": loss_class, "loss_box": loss_box}
        if self.has_mask():
            positive = [found > 0 for found in labels]
            logits = self.mask_predictor(x[torch.cat(positive)])
            boxes, index = ([a[p] for a, p in zip(part, positive, strict=True)] for part in (proposals, matched))
            masks, truths = ([t[name] for t in targets] for name in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, truths, index)
        return [], losses

    def detect(self, features, proposals, image_shapes) -> list[dict[str, torch.Tensor]]:
        """Each image's boxes, scores and labels, and masks where there is a predictor of them."""
        logits, regression = self.box_predictor(self.region_features(features, proposals).mean((2, 3)))
        found = zip(*self.postprocess_detections(logits, regression, proposals, image_shapes), strict=True)
        results = [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in found]
        if self.has_mask():
            masks = self.mask_predictor(self.region_features(features, [r["boxes"] for r in results]))
            for result, mask in zip(results, maskrcnn_inference(masks, [r["labels"] for r in results]), strict=True):
                result["masks"] = mask
        return results


def make_detector(
    backbone: nn.Module,
    normalization: Normalization,
    *,
    classes: int,
    masks: bool,
    sizes_px: Iterable[int],
    rois: int,
) -> GeneralizedRCNN:
    """Faster R-CNN, with `masks` Mask R-CNN, for `classes` classes beside the background, on a pretrained ResNet.

    `sizes_px` are the lengths of an image's shorter side in training, drawn for every image; the last is the
    test's. Anchors are scaled with that: as published at 800 px. `rois` proposals of an image train the heads.
    Raises UserError for a backbone that is no ResNet.
    """
    if not all(hasattr(backbone, name) for name in ("conv1", "bn1", "maxpool", *STAGES, "layer4")):
        raise UserError("detection needs a ResNet with layer1 … layer4; choose a checkpoint of one with --checkpoint")
    body, layer4, test_px = C4Body(backbone), backbone.get_submodule("layer4"), tuple(sizes_px)[-1]
    with torch.no_grad():
        channels = layer4.eval()(torch.zeros(1, body.out_channels, 2, 2)).shape[1]
    sides = tuple(max(1, round(side * test_px / 800)) for side in ANCHOR_SIDES_AT_800_PX)
    proposals = RegionProposalNetwork(
        AnchorGenerator((sides,), (ANCHOR_RATIOS,)),
        RPNHead(body.out_channels, len(sides) * len(ANCHOR_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12_000, "testing": 6000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    align = RoIAlign(ROI_PX, spatial_scale=1 / body.stride, sampling_ratio=-1, aligned=True)
    heads = C4Heads(align, layer4, channels, classes + 1, masks, rois)
    resize = GeneralizedRCNNTransform(
        tuple(sizes_px), round(test_px * LONGEST_SHARE), list(normalization.mean), list(normalization.std)
    )
    return GeneralizedRCNN(body, proposals, heads, resize).train()


def detectron2_name(name: str) -> str:
    """A ResNet parameter's name in torchvision → in Detectron2.

        conv1.weight            stem.conv1.weight          layer1 … layer4    res2 … res5
        bn1.running_mean        stem.conv1.norm.…          bn2.weight         conv2.norm.weight
        layer1.0.downsample.0   res2.0.shortcut            downsample.1       shortcut.norm

    Source: the modules of detectron2/modeling/backbone/resnet.py and facebookresearch/moco's
    detection/convert-pretrain-to-detectron2.py, which has the same map.
    """
    first, *rest = name.split(".")
    parts = [f"res{int(first[5:]) + 1}", *rest] if first.startswith("layer") else ["stem", first, *rest]
    text = ".".join(parts).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for i in (1, 2, 3):
        text = text.replace(f"bn{i}.", f"conv{i}.norm.")
    return text


def detectron2_weights(backbone: nn.Module) -> dict:
    """A torchvision ResNet as the dict that Detectron2 loads from a .pkl file, its names matched by their endings.

    There with stride in the 3×3 convolution (RESNETS.STRIDE_IN_1X1 False) and RGB input normalized as here.
    """
    names = list(backbone.state_dict())
    if "layer4.0.conv1.weight" not in names or "conv1.weight" not in names:
        raise UserError("Detectron2's layout is that of a ResNet with layer1 … layer4; choose a checkpoint of one")
    weights = {
        detectron2_name(name): np.ascontiguousarray(tensor.cpu().numpy())
        for name, tensor in backbone.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    return {"model": weights, "__author__": "Barlow Twins at the speed of the hardware", "matching_heuristics": True}
