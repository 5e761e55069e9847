"""What every entry point shares: the command line, and the places where things are kept."""

import io
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from pipeline.errors import SURROUNDINGS, UserError, system_errors

REPO = Path(__file__).resolve().parents[1]  # the code's folder: a checkout, or where the wheel was installed
_INSTALLED = any(REPO.glob("barlow_at_speed-*.dist-info"))  # beside the code only if it was unpacked from the wheel
_HOME = Path.cwd() if _INSTALLED else REPO
DATA = _HOME / "data"
RUNS = _HOME / "runs"
TRY_AGAIN = "make room, change its rights, repair the disk, or raise the limit, then run the same command again"


def shown(path: Path) -> str:
    """A path as one types it here: relative where it lies below the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def typed(script: str, *arguments: str | Path) -> str:
    """The line that starts one of our commands from here."""
    parts = (REPO / script, *arguments)
    return "python " + shlex.join(shown(part) if isinstance(part, Path) else part for part in parts)


def run_command(config_type: type, main: Callable, default=None) -> None:
    """Parses the command line into `config_type`, calls `main(config)`; a UserError becomes exit code 2.

    So does what the operating system refuses, where nobody has said it better.

    `default`, an instance of `config_type`, stands in for the flags that are not given (a preset).
    An unknown or malformed flag is exit code 2 as well (tyro's). Anything else keeps its traceback:
    it is a fault of ours, not of the user's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale's: what it cannot show must not end a program
        sys.stdout.reconfigure(errors="replace")
    config = tyro.cli(config_type, description=sys.modules["__main__"].__doc__, default=default)
    try:
        with system_errors("this command", TRY_AGAIN, only=SURROUNDINGS):
            main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        if not _nobody_reads_stdout():  # another pipe: a fault of ours
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # as in `… | head`: what is still buffered has nowhere to go
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(130)


def _nobody_reads_stdout() -> bool:
    asked = select.poll()
    asked.register(1, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))
