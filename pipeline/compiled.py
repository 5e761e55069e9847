"""How compiled functions are compiled here, and where their machine code is kept. Nothing else calls `numba.njit`.

Numba keeps compiled code beside a source file and trusts it while that one file is unchanged. But a function's
code contains that of the functions it calls: change those in another file, and the old ones would still run. So
the code is kept in a folder named after a digest of every source file of the package. Each decorator below tells numba
that folder.

Compiled functions take their arguments by position, also more than three: that is how kernels call each other.
"""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
from numba.core.types.function_type import CompileResultWAP

_PACKAGE = Path(__file__).resolve().parent
MONTH_S = 30 * 24 * 3600


def source_digest(folder: Path) -> str:
    """The digest of the names and contents of all Python files in a folder and below it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _places() -> list[Path]:
    """Where the folder may lie, the best place first: where $NUMBA_CACHE_DIR says, here, at home, in /tmp."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/nonexistent") / ".cache")
    own = Path(tempfile.gettempdir()) / f"barlow-at-speed-{os.getuid()}"
    return [*([Path(given)] if given else []), _PACKAGE / "__pycache__", home / "barlow-at-speed", own]


def cache_folder() -> str:
    """The folder of this version's machine code, made where it can be; those unused for a month are removed."""
    name = f"numba-{source_digest(_PACKAGE)}"
    for place in _places():
        try:
            (place / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.stat().st_uid != os.getuid() or not os.access(place / name, os.W_OK):
                continue  # machine code that another user may write is not run
            os.utime(place / name)
            for other in place.glob("numba-*"):
                if time.time() - other.stat().st_mtime > MONTH_S:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError:
            continue
        return str(place / name)
    return tempfile.mkdtemp(prefix="numba-")  # compiled again by each program, but never old


_FOLDER = cache_folder()
# Triton and matplotlib keep what they make at home. Where nobody may write there, the one stops and the other warns.
if not os.access(os.path.expanduser("~"), os.W_OK):
    for _variable in ("TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(_variable, f"{_FOLDER}/{_variable}")


def compiled(**options):
    """`numba.njit` with its code kept in this version's folder, to run without the interpreter's lock."""
    numba.config.CACHE_DIR = _FOLDER  # numba reads it where a function is decorated
    return numba.njit(cache=True, nogil=True, **options)


def jit(function):
    """For functions that Python may call."""
    return compiled(no_cfunc_wrapper=True)(function)


def kernel(function):
    """For functions that only compiled code calls: half the time to compile, as they need no way in from Python."""
    return compiled(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def inlined(function):
    """For functions that become part of those that call them."""
    return numba.njit(inline="always")(function)


def by_address(function, *arguments) -> CompileResultWAP:
    """A function of `compiled()` for other people's compiled code: called where it lies, not compiled into theirs.

    Code that calls a function of ours directly is linked with it and translated to machine code with it, at each
    start of a program: a minute for the views. `arguments` are some of the types that it will be called with.
    """
    types = tuple(numba.typeof(argument) for argument in arguments)
    function.compile(types)
    return CompileResultWAP(function.overloads[types])


# Numba lets a negative index count from the end and checks each index that it cannot prove positive, which keeps
# a loop from becoming vector code. So an index that is a sum is a sum of unsigned numbers.
unsigned = np.uint64
