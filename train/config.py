"""What one pretraining run is: a frozen dataclass, and which of its values decide the weights.

Every field is a flag of train/pretrain.py; its docstring is the flag's help. The presets and what is checked are in
cards.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from pipeline.command import DATA
from pipeline.constants import CIFAR10_MEAN, CIFAR10_STD
from pipeline.errors import UserError
from pipeline.spec import WITHOUT, Blocks, Normalization

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}  # the type that --amp computes in
NORMALIZATIONS = {"imagenet": Normalization(), "cifar10": Normalization(CIFAR10_MEAN, CIFAR10_STD)}

LOSSES = ("barlow-twins", "invariance", "redundancy", "cross-entropy")
EMBEDDING_NORMS = ("batch", "feature", "none")
METHOD_NAMES = ("barlow_twins", "simclr", "byol", "simsiam", "vicreg")
CARDS = tuple(
    base if method == "barlow_twins" else f"{base}-{method}"
    for base in ("imagenet", "cifar10", "cifar10-demo")
    for method in METHOD_NAMES
)

# Flags that change where a run lives or how fast it goes, not which weights come out of it.
NOT_RECIPE = ("preset", "data", "run", "loader", "workers", "views_on", "resume", "compile", "log_every")
NOT_RECIPE += ("checkpoint_every_steps", "checkpoint_every_minutes", "keep", "activations")
# Substitution is among them: up to the first bad image, where a run that stops ends, it changes nothing.
NOT_RECIPE += ("on_nan", "on_bad_image", "timeout_minutes", "wandb", "cuda_graph", "deterministic")
NOT_RECIPE += ("views_together", "checkpoint_activations", "accumulate")  # the last two in older checkpoints only
NOT_RECIPE += ("knn_every", "knn_images")

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
class PretrainConfig:
    """Pretrain an encoder without labels. Every default below is the chosen preset's value."""

    preset: Literal[CARDS] = "imagenet"
    """The experiment card to start from; every other flag changes one value of it. imagenet, cifar10 and
    cifar10-demo are Barlow Twins; with -simclr, -byol, -simsiam or -vicreg behind it, that method."""
    method: Literal[METHOD_NAMES] = "barlow_twins"
    """What is optimized. Named here, the card is that method's; everything else stays shared."""
    data: Path = DATA / "imagenet"
    """A folder that holds train.beton, or a .beton file, or, for --loader dali, the shards.json of shards."""
    run: Annotated[str, tyro.conf.arg(aliases=["--name"])] = ""
    """Name of the run, a folder under runs/, or a path. Empty: preset, architecture, epochs and a short hash
    of the recipe, so that the same command finds its own run again and another recipe never meets it.
    (--name is for a torchrun that takes --run for an option of its own; the one in .venv does not.)"""
    fraction: float = 1.0
    """Share of the training images, the same of every class; the seed chooses which."""
    epochs: int = 300
    """Passes over the data. 0 writes the untrained network and ends: a control for the evaluations."""
    global_batch: int = 1024
    """Images of one step over all ranks. Full batches only: the last, short one of an epoch is dropped."""
    arch: str = "resnet50"
    """A ResNet of torchvision by name (resnet18 … wide_resnet101_2), resnet10_narrow, else any model of timm."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """How the network begins: 7×7 stride 2 and a max-pool, or, for small images, 3×3 stride 1 and none."""
    projector: str = "8192-8192-8192"
    """Widths of the projector's linear layers; the last is the embedding's."""
    predictor: str = ""
    """Widths of the predictor behind the projector (BYOL, SimSiam); the last is the embedding's. With Barlow Twins an
    ablation (table 6): on the first view's side."""
    resolution: int = 224
    """Side of the square views, px."""
    resolution_schedule: str = ""
    """Smaller views first, as px@epoch: 128@0,160@100,224@200 is 128 px from the first epoch on, 160 px after 100, and
    224 px, which --resolution must say too, after 200. Empty: --resolution throughout."""
    views: Literal["imagenet", "cifar10"] = "imagenet"
    """The method's view table and the normalization: as published, or for CIFAR-10 (no blur)."""
    lambd: float = 0.0051
    """Weight of the redundancy (off-diagonal) term."""
    loss_scale: float = 1.0
    """Factor on the whole loss of Barlow Twins."""
    temperature: float = 0.1
    """Of SimCLR's softmax over cosines, and of --loss cross-entropy."""
    ema: float = 0.99
    """How much of its target network BYOL keeps in a step, at the start; it rises to 1 along a cosine."""
    stop_gradient: bool = False
    """On SimSiam's cards: without it the network collapses, which effective_dimensions shows. With Barlow Twins the
    second view's side is the one that stops (Zbontar 2021, table 6)."""
    loss: Literal[LOSSES] = "barlow-twins"
    """Ablation of Barlow Twins (table 5): one term alone, or a cross-entropy of C's entries with --temperature."""
    embedding_norm: Literal[EMBEDDING_NORMS] = "batch"
    """Ablation of Barlow Twins (table 5): what happens to embeddings before C. batch: mean 0 and deviation 1 of every
    dimension; feature: besides, every embedding scaled to length 1, C not divided by the batch; none: mean 0 alone."""
    projector_norm: Literal["batch", "none"] = "batch"
    """Ablation of Barlow Twins (table 5): the projector's hidden layers without batch norm."""
    without: tuple[Literal[tuple(WITHOUT)], ...] = ()
    """Augmentations to leave out of both views (figure 3): --without grey solarize."""
    lr_weights: float | None = None
    """Learning rate of the weights, × global batch / 256. None: by global batch, as measured for 300 epochs
    (128 → .7, 256 → .4, 512 → .3, 1024 → .25, 2048 and more → .2; Barlow Twins, issue 7)."""
    lr_biases: float | None = 0.0048
    """Learning rate of biases and batch norm (1-d parameters), × global batch / 256. None: as the weights'."""
    paper_world_size: int = 16
    """Divides the gradient of 1-d parameters. The published code's gradient is the true one divided by its
    world size; LARS hides that for weights, but the published --lr-biases was chosen at 16. Gradients here
    are the true ones on any number of ranks; 16 reproduces the published bias steps, 1 leaves them as they are."""
    weight_decay: float = 1e-6
    """Of the weights; 1-d parameters have none."""
    lars_eta: float = 0.001
    """LARS trust coefficient: a weight's step is this share of its norm."""
    lars_clip: bool = False
    """Caps LARS's adapted learning rate at the learning rate itself (as LARC does)."""
    warmup_epochs: int = 10
    """Linear warm-up from 0; then a cosine to a thousandth."""
    loader: Literal["ffcv", "resident", "torch", "dali"] = "ffcv"
    """Which data path: the fast one, that with every image decoded once and kept in GPU memory (RAM without a GPU), the
    PIL/torchvision reference, or DALI as decoder. Same views, same order."""
    workers: int = 0
    """Threads (ffcv, resident, dali) or processes (torch) of each rank's loader; 0: one a core it may use."""
    views_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Who makes the views: the GPU's kernels where there is one, or the CPU's. The pixels are the same."""
    order: Literal["shuffled", "blocks"] = "shuffled"
    """shuffled: every epoch a new permutation. blocks: for a file larger than the memory, in long reads; mixes a
    window of neighbours from all over the file at a time, not all images (pipeline/choices/order.py says how well)."""
    block_images: int = 16
    """With --order blocks: neighbours in the file that are read at once."""
    window_blocks: int = 2048
    """With --order blocks: blocks that are mixed. Two windows must fit in the memory beside the program: 7 GB here,
    at ImageNet's 110 kB an image."""
    on_bad_image: Literal["stop", "substitute"] = "stop"
    """An image that cannot be decoded ends the run, with its file named; substitute: another one, drawn from the
    seed, the epoch and the image, stands in for it, and metrics.jsonl counts them."""
    seed: int = 0
    """Decides the initial weights, the order of images, every view, and which images --fraction takes."""
    init_from: Path | None = None
    """Begin with the weights of a checkpoint instead of random ones: a run folder or file of ours, a published Barlow
    Twins resnet50.pth or checkpoint.pth (the projector too, where it has the same widths). Of several ResNets in a
    file, the one that was trained, not its average (train/foreign.py). Schedule and momentum start from scratch."""
    key: str = ""
    """Another one of several networks in the file of --init-from: its place there, or whole names out of it."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the run's checkpoint where there is one. never: start over, replacing it."""
    amp: Literal["bf16", "fp16", "off"] = "bf16"
    """Autocast of backbone and projector; the loss is float32 always. fp16 scales the loss, at one sync a step."""
    activations: Literal["auto", "all", "half", "blocks"] = "auto"
    """What a step keeps for its backward pass; the rest is computed again. all: everything, the fastest. half: half of
    it, with --compile. blocks: the input of each block alone, not compiled: the same bits, the least memory, about a
    third more work. auto: the first of these that fits the GPU; on a CPU all."""
    compile: Switch = None
    """torch.compile backbone and projector: minutes at the start, faster steps on a GPU. Left out: on a GPU, but not
    with --deterministic or --activations blocks."""
    cuda_graph: Switch = None
    """Record a whole step once and replay it: for steps so small that starting their kernels takes longer than running
    them (CIFAR-10). One GPU, bf16 or no autocast. The update is the same up to rounding. Left out: on the CIFAR-10
    cards, where it works and without --deterministic."""
    views_together: Switch = None
    """Both views through the networks in one pass, each batch norm still over one view at a time: the same update up to
    rounding (dropout draws other masks), with half as many kernels, each on twice the images. Left out: where the step
    is compiled and recorded."""
    knn_every: int = 0
    """Epochs between two nearest-neighbour accuracies of the network in training (metrics.jsonl, TensorBoard, bar); 0:
    none. Rank 0 computes them from a copy of the backbone beside the steps; the weights do not change by it."""
    knn_images: int = 5000
    """Images that vote, and at most as many that are asked: of val.beton beside the training file where there is one,
    else training images that do not vote. Each time 2 × so many centre views are decoded and go through the backbone
    once: half a minute of one core for 224 px."""
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits every time, which are slower: a resumed run then ends with the
    weights of one that never stopped, bit for bit, as it does on a CPU."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    wandb: str = ""
    """A project on Weights & Biases that the same numbers go to (`pip install wandb` first). Empty: none."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints, besides those on signals, at the end of the run, and at the end of an epoch that
    comes a minute or more after the last one; 0: none by steps."""
    checkpoint_every_minutes: float = 15.0
    """Minutes after which one more is written; 0: none by the clock. Training waits for the copy, not for the disk."""
    keep: int = 2
    """Checkpoints that stay: checkpoint.pt and those before it, by step. A damaged one is passed over at the start."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss that is not finite ends the run, with its step and images named; skip: such a step makes no update, nor
    does one with such a gradient, at one host sync a step. Ten in a row end the run all the same."""
    timeout_minutes: float = 15.0
    """A rank that waits so long within a step ends the run and names the rank it waited for; 0: it waits on."""


def resolution_rows(schedule: str) -> tuple[tuple[int, int], ...]:
    """ "128@0,224@200" → ((0, 128), (200, 224)): from which epoch on the views have which side, px."""
    try:
        rows = tuple((int(epoch), int(px)) for px, epoch in (row.split("@") for row in schedule.split(",") if row))
    except ValueError:
        rows = ((-1, 0),)
    epochs = [epoch for epoch, _ in rows]
    if rows and (epochs[0] != 0 or epochs != sorted(set(epochs)) or min(px for _, px in rows) < 1):
        raise UserError(
            f"--resolution-schedule {schedule!r} is no list of px@epoch, the first at epoch 0 and the others later and"
            " later; write it like 128@0,160@100,224@200"
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
    """The part of a configuration that decides the weights: what a checkpoint must share with the run resuming it."""
    return {name: value for name, value in plain.items() if name not in NOT_RECIPE and (name, value) != ("key", "")}
