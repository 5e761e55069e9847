"""What one pretraining run is. Every field is a flag of train/pretrain.py, its docstring the flag's help.

    Recipe          decides the weights: what a checkpoint must share with the run that resumes it
    Running         where a run lives, how fast it goes, what it writes: none of it changes the weights
    PretrainConfig  both

The experiment cards are in cards.py; flags.py makes a checked configuration of a card and a command line.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from pipeline.command import DATA
from pipeline.constants import CIFAR10_MEAN, CIFAR10_STD
from pipeline.errors import UserError
from pipeline.spec import Blocks, Normalization

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}  # the type that --amp computes in
NORMALIZATIONS = {"imagenet": Normalization(), "cifar10": Normalization(CIFAR10_MEAN, CIFAR10_STD)}

Loss = Literal["barlow-twins", "invariance", "redundancy", "cross-entropy"]
EmbeddingNorm = Literal["batch", "feature", "none"]
MethodName = Literal["barlow_twins", "simclr", "byol", "simsiam", "vicreg", "moco_v2", "swav"]
Augmentation = Literal["crop", "flip", "jitter", "grey", "blur", "solarize"]  # the keys of pipeline.spec.WITHOUT
Activations = Literal["auto", "all", "half", "blocks"]
Preset = Literal[
    "imagenet", "imagenet-simclr", "imagenet-byol", "imagenet-simsiam", "imagenet-vicreg",
    "cifar10", "cifar10-simclr", "cifar10-byol", "cifar10-simsiam", "cifar10-vicreg",
    "cifar10-demo", "cifar10-demo-simclr", "cifar10-demo-byol", "cifar10-demo-simsiam", "cifar10-demo-vicreg",
    "imagenet-moco_v2", "cifar10-moco_v2", "cifar10-demo-moco_v2",
    "imagenet-swav", "cifar10-swav", "cifar10-demo-swav",
]  # fmt: skip
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
GONE = {"checkpoint_activations", "accumulate"}  # in older checkpoints; like Running, they did not change the weights
LATER = {"key": "", "queue": 0, "prototypes": 3000}  # flags that older checkpoints lack: what those runs did

# A flag that may be left out (None: the device decides), given alone, or given with True or False.
Switch = Annotated[
    bool | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{True,False}]",
        instance_from_str=lambda given: given != ["False"],
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
        choices=("True", "False"),
    ),
]


@dataclass(frozen=True)
class Recipe:
    """What decides the weights."""

    method: MethodName = "barlow_twins"
    """What is optimized. Given here, that method's card is used; everything else stays shared."""
    fraction: float = 1.0
    """Share of the training images to use, the same of every class; the seed chooses which."""
    epochs: int = 300
    """Passes over the data. 0 writes the untrained network and ends: a control for the evaluations."""
    global_batch: int = 1024
    """Images of one step, over all ranks. Only full batches: an epoch's last, shorter one is dropped."""
    arch: str = "resnet50"
    """A ResNet of torchvision by name (resnet18 … wide_resnet101_2), resnet8_narrow or resnet10_narrow for small images
    on a CPU, or any model of timm."""
    stem: Literal["imagenet", "small", "solo-learn"] = "imagenet"
    """How a ResNet of torchvision begins: imagenet is 7×7 stride 2 and a max-pool; small, for small images, is 3×3
    stride 1; solo-learn is that project's network for CIFAR: small padded by 2, and no batch norm starts at zero."""
    projector: str = "8192-8192-8192"
    """Widths of the projector's linear layers; the last one is the embedding's."""
    predictor: str = ""
    """Widths of the predictor behind the projector (BYOL, SimSiam); the last one is the embedding's. With Barlow Twins
    an ablation (table 6): only the first view goes through it."""
    resolution: int = 224
    """Side of the square views, px."""
    resolution_schedule: str = ""
    """Smaller views first, as px@epoch: 128@0,160@100,224@200 means 128 px from the first epoch on, 160 px from epoch
    100, and 224 px from epoch 200. The last size must be --resolution. Empty: --resolution throughout."""
    views: Literal["imagenet", "cifar10"] = "imagenet"
    """The method's augmentations and the normalization: as published for ImageNet, or as solo-learn has them for
    CIFAR-10."""
    lambd: float = 0.0051
    """Weight of the redundancy (off-diagonal) term."""
    loss_scale: float = 1.0
    """Factor on the whole loss of Barlow Twins."""
    temperature: float = 0.1
    """Temperature of the softmax over cosines in SimCLR, MoCo v2 and SwAV, and of --loss cross-entropy."""
    prototypes: int = 3000
    """Number of SwAV's prototypes, which share the images of each step equally."""
    ema: float = 0.99
    """How much of its following network a step keeps: of BYOL's target at the start, rising to 1 along a cosine; of
    MoCo v2's key encoder in every step."""
    queue: int = 0
    """How many keys of earlier batches MoCo v2 compares with: at least --global-batch, at most the training images."""
    stop_gradient: bool = False
    """Used by SimSiam's cards: without it the network collapses, which effective_dimensions shows. With Barlow Twins an
    ablation (table 6): the second view gets no gradient."""
    loss: Loss = "barlow-twins"
    """Ablation of Barlow Twins (table 5): one term alone, or a cross-entropy of C's entries with --temperature."""
    embedding_norm: EmbeddingNorm = "batch"
    """Ablation of Barlow Twins (table 5): how embeddings are normalized before C. batch: every dimension to mean 0 and
    deviation 1; feature: then also every embedding to length 1, and C is not divided by the batch; none: mean 0."""
    projector_norm: Literal["batch", "none", "all"] = "batch"
    """Where the projector has batch norm. batch: in its hidden layers; none: nowhere, with SimCLR biases instead
    (its cifar10 card); all: behind the last layer too (SimCLR's imagenet card). With Barlow Twins none is an ablation
    (table 5), and there is no all."""
    without: tuple[Augmentation, ...] = ()
    """Augmentations to leave out of both views (figure 3): --without grey solarize."""
    lr_weights: float | None = None
    """Learning rate of the weights, × global batch / 256. None: chosen by the global batch, as measured for 300 epochs
    (128 → .7, 256 → .4, 512 → .3, 1024 → .25, 2048 and more → .2; Barlow Twins, issue 7)."""
    lr_biases: float | None = None
    """Learning rate of biases and batch norm (1-d parameters), × global batch / 256. None: with Barlow Twins 0.024 ×
    --lr-weights, as the table above was measured (1024 → .0060; 2048 → .0048, the published one); with the other
    methods the same as --lr-weights."""
    paper_world_size: int = 16
    """Divides the gradient of 1-d parameters. The published code's gradient is the true one divided by its number of
    GPUs; LARS hides that for weights, but the published --lr-biases was chosen with 16 GPUs. Gradients here are the
    true ones on any number of ranks: 16 reproduces the published bias steps, 1 leaves them as they are."""
    weight_decay: float = 1e-6
    """Weight decay of the weights; 1-d parameters have none, except with SwAV and --views imagenet, as published."""
    lars_eta: float = 0.001
    """LARS trust coefficient: the ratio of a weight's step to its norm."""
    lars_clip: bool = False
    """Limits the learning rate that LARS adapts to the learning rate itself (as LARC does)."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up from 0; after it, a cosine down to a thousandth."""
    order: Literal["shuffled", "blocks"] = "shuffled"
    """shuffled: a new permutation every epoch. blocks: for a file larger than the memory. It reads long stretches and
    mixes a window of blocks from all over the file, not all images (pipeline/choices/order.py says how well)."""
    block_images: int = 16
    """With --order blocks: how many neighbouring images of the file are read at once."""
    window_blocks: int = 2048
    """With --order blocks: how many blocks are mixed. Two windows must fit in the memory beside the program: 7 GB with
    these values and ImageNet's 110 kB an image."""
    seed: int = 0
    """Decides the initial weights, the order of images, every view, and which images --fraction takes."""
    init_from: Path | None = None
    """Start from the weights of a checkpoint instead of random ones: a run folder or file of this program, a published
    Barlow Twins resnet50.pth or checkpoint.pth (with its projector, if the widths are equal), or somebody else's file
    of the network that --arch names (eval/README.md). If a file holds several, the one that was trained, not its
    average. The schedule and momentum start from scratch."""
    key: str = ""
    """Chooses another network if the file of --init-from holds several: its path in the file, or whole parts of that
    path (train/foreign.py)."""
    amp: Literal["bf16", "fp16", "off"] = "bf16"
    """Autocast of backbone and projector; the loss is always float32. fp16 scales the loss, at one host sync a step."""


@dataclass(frozen=True)
class Running:
    """What does not change the weights."""

    preset: Preset = "imagenet"
    """The experiment card to start from; every other flag changes one value of it. imagenet, cifar10 and
    cifar10-demo are Barlow Twins; with -simclr, -byol, -simsiam, -vicreg, -moco_v2 or -swav appended, that method."""
    data: Path = DATA / "imagenet"
    """A folder that holds train.beton, a .beton file, or, with --loader dali, the shards.json of WebDataset shards."""
    run: Annotated[str, tyro.conf.arg(name="name", aliases=["--run"])] = ""
    """Name of the run, a folder under runs/, or a path. Empty: the preset, architecture, epochs and a short hash of the
    recipe, so the same command finds its own run again and two recipes never share one."""
    loader: Literal["fast", "ffcv", "resident", "torch", "dali"] = "fast"
    """Which data path, with the same views in the same order: our threads, FFCV's Loader, every image decoded once and
    kept in memory (the GPU's where there is one), the PIL/torchvision reference, or DALI as decoder."""
    workers: int = 0
    """Threads of each rank's loader (processes with --loader torch); 0: one for every core it may use."""
    views_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the views are made; auto: on the GPU if there is one. The pixels are the same."""
    on_bad_image: Literal["stop", "substitute"] = "stop"
    """stop: an image that cannot be decoded ends the run, and its file is named. substitute: another image, chosen by
    the seed, the epoch and the image, takes its place, and metrics.jsonl counts such images."""
    check_bytes: bool = True
    """Compare each image's bytes with the conversion's digest (in .files.tsv beside the data) when it is first used;
    one that has changed on the disk counts as one that cannot be decoded."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the run's checkpoint if there is one. never: start over and replace it."""
    activations: Activations = "auto"
    """What a step keeps for its backward pass; the rest is computed again. all: everything, the fastest. half: half of
    it; needs --compile. blocks: only the input of each block, not compiled: the same bits, the least memory, about a
    third more work. auto: the first of these that fits the GPU; on a CPU all."""
    compile: Switch = None
    """torch.compile for backbone and projector: takes minutes at the start and makes steps faster on a GPU. Left out:
    on for a GPU, unless --deterministic or --activations blocks is given."""
    cuda_graph: Switch = None
    """Record a whole step once and replay it: for steps so small that launching their kernels takes longer than running
    them (CIFAR-10). Needs one GPU and bf16 or no autocast. The update is the same up to rounding. Left out: on for the
    CIFAR-10 cards where it works, unless --deterministic is given."""
    views_together: Switch = None
    """Both views go through the networks in one pass; each batch norm still sees one view at a time. The update is the
    same up to rounding (dropout draws other masks), with half as many kernels, each on twice the images. Left out: on
    if the step is compiled and recorded. It makes no difference to SimCLR, SwAV and MoCo v2."""
    knn_every: int = 0
    """Epochs between accuracies of the network in training (metrics.jsonl, TensorBoard, progress bar): knn_top1, the
    nearest neighbours' vote, and linear_top1, a linear layer trained beside the network on its features; 0: none. Rank
    0 computes them beside the steps from a copy of the backbone; the network's weights do not change."""
    knn_images: int = 5000
    """How many images vote, and at most how many are classified: those of val.beton beside the training file if there
    is one, else training images that do not vote. Each time 2 × this many centre views are decoded and go through the
    backbone once: half a minute of one core at 224 px."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits every time, which are slower. A resumed run then ends with the
    weights of one that never stopped, bit for bit, as it always does on a CPU."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl; where an epoch has fewer steps, those of an epoch."""
    wandb: str = ""
    """Weights & Biases project that also gets the numbers (`pip install wandb` first). Empty: none."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints; 0: none by steps. In any case one is written on a signal, at the end of the run,
    and at the end of an epoch if the last one is more than a minute old."""
    checkpoint_every_minutes: float = 15.0
    """Minutes between two checkpoints; 0: none by the clock. Training waits for the copy, not for the disk."""
    keep: int = 2
    """Checkpoints to keep: checkpoint.pt and earlier ones, named by step. A resumed run skips a damaged one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """stop: a loss that is not finite ends the run, and its step and images are named. skip: a step whose loss or
    gradient is not finite makes no update, at one host sync a step; ten in a row still end the run."""
    timeout_minutes: float = 15.0
    """A rank that waits this long within a step ends the run and names the rank that it waited for; 0: it keeps
    waiting."""


@dataclass(frozen=True)
class PretrainConfig(Recipe, Running):
    """Pretrain an encoder without labels. Every default below is the chosen preset's value."""


RUNNING = {field.name for field in fields(Running)}


def resolution_rows(schedule: str) -> tuple[tuple[int, int], ...]:
    """ "128@0,224@200" → ((0, 128), (200, 224)): from which epoch on the views have which side, px."""
    try:
        rows = tuple((int(epoch), int(px)) for px, epoch in (row.split("@") for row in schedule.split(",") if row))
    except ValueError:
        rows = ((-1, 0),)
    epochs = [epoch for epoch, _ in rows]
    if rows and (epochs[0] != 0 or epochs != sorted(set(epochs)) or min(px for _, px in rows) < 1):
        raise UserError(
            f"--resolution-schedule {schedule!r} is not a list of px@epoch with rising epochs from 0 on; write it like"
            " 128@0,160@100,224@200"
        )
    return rows


def projector_widths(projector: str) -> list[int]:
    """ "8192-8192-8192" → [8192, 8192, 8192]."""
    try:
        widths = [int(width) for width in projector.split("-")]
    except ValueError:
        widths = [0]
    if min(widths) < 1:
        raise UserError(f"--projector {projector!r} is not a list of widths; write them like 8192-8192-8192")
    return widths


def order_blocks(config: PretrainConfig) -> Blocks | None:
    """What --order means to the order module."""
    return Blocks(config.block_images, config.window_blocks) if config.order == "blocks" else None


def as_plain(config: PretrainConfig) -> dict:
    """The configuration as JSON would hold it: the form in config.json and in checkpoints."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }


def recipe(plain: dict) -> dict:
    """The part of a plain configuration that decides the weights.

    A name that is not known here counts as part of it; a flag of LATER does not where it says what older runs did.
    """
    others = RUNNING | GONE
    return {name: value for name, value in plain.items() if name not in others and (name, value) not in LATER.items()}
