"""Seconds from the start of a program to its first batch of both views, imports and compiling included.

    python scripts/bench/first_batch.py FILE.beton IMAGES

loader.py runs it with an empty and with a filled cache of compiled code.
"""

import time

start = time.time()  # before the imports, which are part of it

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from pipeline.loader import make_loader  # noqa: E402
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig  # noqa: E402

if __name__ == "__main__":
    loader = make_loader(LoaderConfig(Path(sys.argv[1]), BARLOW_TWINS_VIEWS, 224, global_batch=int(sys.argv[2])))
    next(iter(loader.batches(0, 1)))
    print(time.time() - start)
    loader.close()
