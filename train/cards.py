"""The experiment cards: whole configurations, each with its cost, hardware, expected result and source beside it.

python train/pretrain.py --preset cifar10 --help     shows a card's values
"""

from dataclasses import replace
from typing import Any

from pipeline.command import DATA
from train.config import PretrainConfig

PRESETS = {
    # ImageNet-1k as published, 300 epochs.
    #   cost      300 × 1.28 M images × 2 views of 224 px; 30 GB for the data, 1.9 GB a checkpoint
    #   hardware  8 GPUs of 32 GB (or 1–2 of 80 GB); ResNet-50, bf16
    #   expect    linear top-1 / top-5 71.4 / 90.2 published for 300 epochs, 71.7 top-1 at this batch and rate
    #   source    Zbontar 2021, section 2.2; batch and learning rate: Barlow Twins, issue 7
    "imagenet": PretrainConfig(),
    # CIFAR-10 as solo-learn trains Barlow Twins on it.
    #   cost      1000 × 50,000 images × 2 views of 32 px
    #   hardware  one GPU of 12 GB
    #   expect    linear top-1 92.10 published after 1000 epochs
    #   source    da Costa 2022 (solo-learn), CIFAR-10 table and its Barlow Twins settings
    "cifar10": PretrainConfig(
        preset="cifar10",
        data=DATA / "cifar10",
        epochs=1000,
        global_batch=256,
        arch="resnet18",
        stem="small",
        projector="2048-2048-2048",
        resolution=32,
        views="cifar10",
        loss_scale=0.1,
        lr_weights=0.3,
        lr_biases=0.3,
        paper_world_size=1,
        weight_decay=1e-4,
        lars_eta=0.02,
        lars_clip=True,
        knn_every=10,
    ),
    # CIFAR-10 in minutes on two CPU cores: shows that everything works and that it learns, no more.
    #   cost      2 × 50,000 images × 2 views of 32 px
    #   hardware  2 CPU cores, about 2 minutes
    #   expect    kNN top-1 at least 8 points above the untrained network's (seen: 14)
    #   source    none; chosen for the time it takes
    "cifar10-demo": PretrainConfig(
        preset="cifar10-demo",
        data=DATA / "cifar10",
        epochs=2,
        global_batch=256,
        arch="resnet8_narrow",
        projector="256-256",
        resolution=32,
        views="cifar10",
        lambd=0.0102,
        lr_weights=0.4,
        lr_biases=0.01,
        paper_world_size=1,
        weight_decay=1e-4,
        lars_eta=0.02,
        warmup_epochs=0,
        amp="off",
    ),
}


# The other methods on the same cards: what differs from Barlow Twins there. Published ImageNet recipes: Chen 2020,
# Grill 2020 (300 epochs), Chen & He 2021, Bardes 2022. CIFAR-10 as solo-learn trains them: linear top-1 after 1000
# epochs 90.74 (SimCLR), 92.58 (BYOL), 90.51 (SimSiam), 92.07 (VICReg), beside Barlow Twins' 92.10.
#
# SwAV (Caron 2020): lr 4.8 at 4096 images; at 256 published as 0.6. Linear top-1 70.1 after 400 epochs of 2×224 at 4096
# (facebookresearch/swav, README.md). CIFAR-10: 89.17 (solo-learn's scripts/pretrain/cifar/swav.yaml), with what is left
# out here: a queue of 3840 embeddings from epoch 50 on, prototypes frozen for two epochs instead of one and trained as
# directions (weight norm), batch norm of one view at a time.
_RIVALS: dict[str, Any] = {"lr_biases": None, "paper_world_size": 1}
RIVALS: dict[str, dict[str, dict[str, Any]]] = {
    "imagenet": {
        "simclr": {"projector": "2048-128", "lr_weights": 0.3},
        "byol": {"projector": "4096-256", "predictor": "4096-256", "lr_weights": 0.3},
        "simsiam": {
            "projector": "2048-2048-2048",
            "predictor": "512-2048",
            "stop_gradient": True,
            "lr_weights": 0.05,
            "weight_decay": 1e-4,
            "warmup_epochs": 0,
        },
        "vicreg": {"lr_weights": 0.2},
        "swav": {"projector": "2048-128", "lr_weights": 0.3},
    },
    "cifar10": {
        "simclr": {"projector": "2048-256", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "4096-256", "predictor": "4096-256", "lr_weights": 1.0, "weight_decay": 1e-5},
        "simsiam": {
            "projector": "2048-2048",
            "predictor": "512-2048",
            "stop_gradient": True,
            "lr_weights": 0.5,
            "weight_decay": 1e-5,
        },
        "vicreg": {"projector": "2048-2048", "lr_weights": 0.3},
        "swav": {"projector": "2048-128", "lr_weights": 0.6, "weight_decay": 1e-6},
    },
    "cifar10-demo": {
        "simclr": {"projector": "256-128", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "512-128", "predictor": "512-128", "lr_weights": 0.4},
        "simsiam": {"projector": "256-256", "predictor": "64-256", "stop_gradient": True, "lr_weights": 0.05},
        "vicreg": {"projector": "256-256", "lr_weights": 0.4},
        "swav": {
            # With few dimensions and a temperature of 4 ε the codes are sharp enough from the start: with 256-128 and
            # 0.1 all predictions became uniform (a loss of ln 64) within 40 steps, at rates of 0.1 to 0.4.
            "projector": "256-32",
            "prototypes": 64,
            "temperature": 0.2,
            "lr_weights": 0.2,
            "lr_biases": 0.01,
        },
    },
}
for _base, _methods in RIVALS.items():
    for _method, _values in _methods.items():
        _name = f"{_base}-{_method}"
        PRESETS[_name] = replace(PRESETS[_base], **_RIVALS | _values | {"preset": _name, "method": _method})
