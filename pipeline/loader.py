"""The one way to get batches: `make_loader(config)` makes the loader that `config.backend` names, and imports no other.

with make_loader(LoaderConfig("train.beton", BARLOW_TWINS_VIEWS, 224, global_batch=256)) as loader:
    for batch in loader.epoch(0):
        one, other = batch.views
"""

from pipeline.errors import UserError
from pipeline.loaders.base import Loader
from pipeline.spec import LoaderConfig
from pipeline.storage.shards import SUFFIX as SHARDS


def make_loader(config: LoaderConfig) -> Loader:
    """The loader of `config.backend`. Raises UserError for a dataset, batch size or backend that cannot work."""
    if not isinstance(config, LoaderConfig):
        raise UserError(f"make_loader was given {config!r}; expected a LoaderConfig (pipeline/spec.py)")
    backend = config.backend
    if backend != "dali" and config.data.name.endswith(SHARDS):
        raise UserError(f"{config.data} are shards, which --loader dali reads; give --data a .beton, or choose that")
    if backend == "torch":
        from pipeline.loaders.reference import TorchLoader

        return TorchLoader(config)
    if backend == "ffcv":
        from pipeline.loaders.ffcv import FfcvLoader

        return FfcvLoader(config)
    from pipeline.loaders.parts import PartsLoader

    if backend == "fast":
        from pipeline.loaders.fast import make_decoder_threads

        return PartsLoader(config, make_decoder_threads)
    if backend == "resident":
        from pipeline.loaders.resident import ResidentPixels

        return PartsLoader(config, ResidentPixels)
    if backend == "dali":
        from pipeline.loaders.dali import DaliPixels

        return PartsLoader(config, DaliPixels)
    raise UserError(f"--loader {backend} is unknown; choose fast, ffcv, resident, torch or dali")
