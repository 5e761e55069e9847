"""What a run says at its end, and when it is started again after that."""

import contextlib
from pathlib import Path

from pipeline.command import shown, typed
from pipeline.errors import UserError
from pipeline.progress import duration_text
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.shards import open_stored
from train.checkpoint import BACKBONE, CHECKPOINT, load_backbone, newest_checkpoint
from train.config import PretrainConfig, as_plain, recipe
from train.methods.choose import view_table
from train.online_knn import held_out, labelled_file
from train.resuming import refuse_other_images, refuse_other_views
from train.run_data import train_beton


def finished(config: PretrainConfig, dataset_sha256: str) -> bool:
    """Whether the run's end is in its folder, whole, and of this recipe and these images. Reads no image.

    False where that is not sure: then the run starts, and says what is wrong.
    """
    folder = Path(config.run)
    if config.resume == "never" or not (folder / BACKBONE).is_file():
        return False
    try:
        newest = newest_checkpoint(folder)
        if newest is None or newest.path.name != CHECKPOINT:
            return False
        exported = load_backbone(folder / BACKBONE)[1]
        theirs = newest.state["config"]
        if recipe(theirs) != recipe(as_plain(config)) or newest.state["step"] != exported.step:
            return False
        refuse_other_views(newest.state, view_table(config), newest.path)
        return refuse_other_images(newest.state, config.data, dataset_sha256, newest.path)
    except UserError:
        return False


def end_text(folder: Path, *, steps: int, images: int, seconds: float) -> str:
    """What this start of a run made: updates of the weights, with so many images, in so long."""
    made = f"{steps} steps in {duration_text(seconds)}, {images / seconds:.0f} images/s" if steps else "no step to do"
    return f"{shown(folder)} is finished: {made}; its encoder is {shown(folder / BACKBONE)}"


def next_text(config: PretrainConfig) -> str:
    """The two commands that come next, which work with these images: where labels are missing nothing can vote."""
    run, images = Path(config.run), train_beton(config.data)
    measure = typed("eval/extract.py", "--checkpoint", run, "--images", images, "--to", run / "features.safetensors")
    with contextlib.suppress(UserError):  # of a val.beton that cannot be read: the run itself is good
        if (file := labelled_file(config.data)) and (val := held_out(file)).is_file() and open_stored(val).labelled:
            of_shards = ["--loader", "dali"] if file.name.endswith(SHARDS) else []
            measure = typed("eval/knn.py", "--checkpoint", run, "--data", file, *of_shards)
    return f"next:\n    {measure}\n    {typed('eval/report.py', run)}"
