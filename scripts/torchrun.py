"""torchrun, with three things mended; scripts/setup.sh puts it into .venv/bin under that name.

Before Python 3.12 torchrun reads a script's flags as abbreviations of its own, and --run is an ambiguous one. And
whatever its processes end with, torchrun ends with 1, after a page of text: here the exit codes that mean something
stay (2: a mistake to mend, 75: stopped by a signal, run me again, 130: Ctrl-C). And where a machine of several is
lost and comes back, torchrun's shared store never tells it where the others are (seen with torch 2.15: rank 0 keeps
the address of the first round to itself), so between machines the ranks make a store of their own each time.
"""

import argparse
import functools
import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

MEANINGFUL = (2, 75, 130)

if __name__ == "__main__":
    if any(argument.startswith("--nnodes") for argument in sys.argv):
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    argparse.ArgumentParser.__init__ = functools.partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)
    try:
        main()
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()} & set(MEANINGFUL)
        if len(codes) != 1:
            raise
        sys.exit(codes.pop())
    except SignalException as stopped:
        logging.shutdown()
        sys.exit(130 if stopped.sigval == signal.SIGINT else 75)
