"""The one kind of error that a user can fix, and what else becomes one."""

import contextlib
import errno
import struct
from collections.abc import Container, Iterator

# What the parsers of others raise at bytes that are not what they should be, besides errors of their own kinds.
BAD_BYTES = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, struct.error),
    *(RecursionError, NotImplementedError, MemoryError),  # nested too deep, of another version, of absurd size
)
# What the operating system refuses through no fault of the code: room, rights, a failing disk, the machine's limits.
SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
SURROUNDINGS |= {errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class UserError(ValueError):
    """The text is one sentence: what was found, what was expected, what to do. Commands end with exit code 2."""


@contextlib.contextmanager
def system_errors(what: str, advice: str, *, only: Container[int] | None = None) -> Iterator[None]:
    """Raises UserError for what the operating system refuses in a block, or in a function that this decorates.

    The text names the file that could not be used, or else `what` needed it, and ends in `advice`; short memory and a
    limit of processes have advice of their own. Other errors pass: also those of the system whose errno is not in
    `only`, and a pipe that nobody reads any more.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (only is not None and error.errno not in only):
            raise
        where = error.filename if isinstance(error.filename, str) else f"a file of {what}"
        raise UserError(f"{where} could not be used ({error.strerror or error}); {advice}") from error
    except MemoryError as error:
        raise UserError(
            f"memory was too short for {what}; end other programs, then run the same command again"
        ) from error
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        raise UserError(
            f"no further thread can be started for {what}; raise the limit of processes (ulimit -u, or the container's)"
            " or give fewer --workers"
        ) from error
