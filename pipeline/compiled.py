"""How compiled functions are compiled here, and where their machine code is kept. Import it before `numba.njit`.

Numba keeps compiled code beside a source file and trusts it while that one file is unchanged. But a function's
code contains that of the functions it calls: change those in another file, and the old ones go on running. So
the code is kept in a folder named after a digest of every source file of the package.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path

import numba
import numpy as np

_PACKAGE = Path(__file__).resolve().parent
MONTH_S = 30 * 24 * 3600


def source_digest(folder: Path) -> str:
    """Of the names and contents of all Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _use_cache_of_these_sources() -> None:
    """Points numba to the folder of this version's code, and removes those that no program has used for a month."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    base = Path(given) if given else _PACKAGE / "__pycache__"
    mine = base / f"numba-{source_digest(_PACKAGE)}"
    try:
        mine.mkdir(parents=True, exist_ok=True)
        os.utime(mine)
    except OSError:
        return  # a read-only installation: numba finds a place of the user's
    for other in base.glob("numba-*"):
        if time.time() - other.stat().st_mtime > MONTH_S:
            shutil.rmtree(other, ignore_errors=True)
    numba.config.CACHE_DIR = str(mine)


_use_cache_of_these_sources()

# Decorators: of functions that Python may call, and of those that only compiled code calls, which compile in half
# the time because they need no way in from Python.
jit = numba.njit(cache=True, nogil=True, no_cfunc_wrapper=True)
kernel = numba.njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Numba lets a negative index count from the end and checks each index that it cannot prove positive, which keeps
# a loop from becoming vector code. So an index that is a sum is a sum of unsigned numbers.
unsigned = np.uint64
