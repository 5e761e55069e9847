"""Files mapped into memory, and what is said if one of them is cut short, or its disk fails, while it is read.

To read mapped bytes is no call that could return an error: the kernel sends SIGBUS, which ends a process without a
word. A handler of Python's would never run, because the same read is tried again before it could. So this handler is
called by C: it names the file that the address lies in, and ends the process with exit code 2. An address in no file
of ours is left to whatever handled SIGBUS before.

It takes Python's lock, which the reading thread has itself, or has released: compiled code runs without it.
"""

import contextlib
import ctypes
import functools
import os
import signal
import threading
import weakref
from pathlib import Path

import numpy as np

from pipeline.errors import UserError

_libc = ctypes.CDLL(None)
_SA_SIGINFO = 4  # the handler is told the address
_ADDRESS_AT = 16  # where in Linux's siginfo_t, bytes

_files: weakref.WeakValueDictionary[int, np.memmap] = weakref.WeakValueDictionary()  # by the address of their bytes
_ending = threading.Lock()


class _Action(ctypes.Structure):
    """Linux's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_before = _Action()


def map_file(path: Path) -> np.memmap:
    """The bytes of a file, (size,) uint8, read-only. Raises UserError for one that is empty or cannot be mapped."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); put the whole file back, then run again") from error
    _files[data.ctypes.data] = data
    _name_lost_files()
    return data


@functools.cache
def _name_lost_files() -> None:
    """Installs the handler, once a process."""
    action = _Action(handler=ctypes.cast(_on_bus_error, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def _on_bus_error(number: int, info: int, _context: int) -> None:
    try:
        address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
        for start, data in _files.items():
            if start <= address < start + data.nbytes:
                _end(str(data.filename), address - start)
    finally:  # not ours: the read is tried again, and meets what was there before
        _libc.sigaction(number, ctypes.byref(_before), None)


def _end(name: str, at: int) -> None:
    _ending.acquire()  # the first of several threads speaks; the others wait here for the end
    text = (
        f"\nerror: {name} can no longer be read at byte {at}: it was cut short while in use, or its disk fails; put the"
        " whole file back (pipeline/convert.py --verify checks a .beton), and run the same command again\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, text.encode("utf-8", "surrogateescape"))
    os._exit(2)
