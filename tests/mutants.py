"""Damaged files for the fuzz tests, of bytes and of JSON, and what a parser may do with one.

A test walks 300 of them: `for mutant in mutants(sound, seed)`, and gives each to `outcome`, which lets through a
result or a UserError of one sentence, and nothing else. What a result has to be, the test says.
"""

import copy
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.errors import UserError

COUNT = 300
LIMIT_S = 10.0


def mutants(sound: bytes, seed: int, count: int = COUNT) -> Iterator[bytes]:
    """`count` damaged copies of a file's bytes, each damaged in another way and place."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield _BYTES[number % len(_BYTES)](sound, rng)


def json_mutants(sound: bytes, seed: int, count: int = COUNT) -> Iterator[bytes]:
    """Damaged copies of a JSON file: two of three are JSON still, with a value of another kind, size or name in it."""
    rng, value = np.random.default_rng(seed), json.loads(sound)
    for number, damaged in enumerate(mutants(sound, seed, count)):
        yield damaged if number % 3 == 0 else json.dumps(_other_value(value, rng)).encode("utf-8", "surrogatepass")


def value_mutants(value: Any, seed: int, count: int = COUNT) -> Iterator[Any]:
    """Damaged copies of nested dicts and lists: a value of another kind, size or name in each."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield _other_value(value, rng)


def outcome(parse: Callable[[], Any]) -> Any:
    """What `parse` returns, or the UserError that it raises. Any other exception, and LIMIT_S, fails the test."""

    def too_long(*_) -> None:
        raise AssertionError(f"no answer within {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return parse()
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ---- bytes ----


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        changed[at] ^= 1 << rng.integers(0, 8)
    return bytes(changed)


def _overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    """Zeros, ones, noise, a line's end or what is not UTF-8, over up to 64 bytes."""
    at, count = rng.integers(0, len(data)), rng.integers(1, 65)
    kinds = (b"\0" * count, b"\xff" * count, rng.bytes(count), b"\n" * count, b"\xc3\x28" * count)
    new = kinds[rng.integers(0, len(kinds))][:count]
    return (data[:at] + new + data[at + count :])[: len(data)]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = rng.integers(0, len(data))
    return data[:at] + rng.bytes(rng.integers(1, 65)) + data[at:]


def _repeat(data: bytes, rng: np.random.Generator) -> bytes:
    """A part of the file once more, and what followed it after that."""
    first, last = sorted(rng.integers(0, len(data), 2))
    return data[:last] + data[first:]


def _leave_out(data: bytes, rng: np.random.Generator) -> bytes:
    at = rng.integers(0, len(data))
    return data[:at] + data[at + rng.integers(1, 65) :]


_BYTES = (_cut, _flip_bits, _overwrite, _insert, _repeat, _leave_out)

# ---- JSON ----

_OTHERS: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 1e308, -(10**9), 10**30, float("nan"), float("inf"), "", "x", "\0", "\ud800", "../up"),
    *([], {}, [[]], [None], {"": None}, "9" * 5000, [0] * 1000),
)


def _other_value(value: Any, rng: np.random.Generator) -> Any:
    """A copy with one place changed: another value, no value, another name, or a neighbour's value."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places:
        return _OTHERS[rng.integers(0, len(_OTHERS))]
    inside, key = places[rng.integers(0, len(places))]
    kind = rng.integers(0, 6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[f"{key} "] = inside.pop(key)
    elif kind == 2:
        other, name = places[rng.integers(0, len(places))]
        inside[key] = copy.deepcopy(other[name])
    else:
        inside[key] = _OTHERS[rng.integers(0, len(_OTHERS))]
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from _places(below)
