"""Counter-based random numbers: every draw is a pure function of where it is used.

`uniform(seed, domain, epoch, sample, view, slot)` needs no state, so a draw does not depend on
workers, batch size, rank, world size, backend, or on what was drawn before. The generator is
Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"):

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (slot // 4, view | domain << 16, sample, epoch)   →   4 words; the slot picks word slot % 4

The tests hold it to the published vectors and to a second implementation, bit for bit.
"""

import numpy as np
import numpy.typing as npt

from pipeline.compiled import jit

DOMAIN_VIEWS = 0  # the random choices of views (draws.py)
DOMAIN_ORDER = 1  # the order of samples in an epoch (order.py)
DOMAIN_SPLIT = 2  # class-balanced subsets of a dataset (subsets.py)
DOMAIN_BLOCKS = 3  # the order of blocks in an epoch (order.py)
DOMAIN_STAND_IN = 4  # which sample stands in for one that cannot be decoded (bad_images.py)
DOMAIN_LIGHTING = 5  # the colour noise of a view (lighting.py)

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
TWO_POW_MINUS_32 = 2.0**-32


@jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox on one counter. Six words in, four words out, all uint64 holding 32 bits."""
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(k0), np.uint64(k1)
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@jit
def words4(seed, domain, epoch, sample, view, block):
    """The four words of one block: of slots 4·block … 4·block + 3."""
    s = np.uint64(seed)
    purpose = np.uint64(view) | (np.uint64(domain) << np.uint64(16))
    return philox4x32(block, purpose, sample, epoch, s & _MASK, s >> _SHIFT)


@jit
def uniform4(seed, domain, epoch, sample, view, block):
    """The same as uniforms in [0, 1), float64 with 32 random bits each."""
    w = words4(seed, domain, epoch, sample, view, block)
    return w[0] * TWO_POW_MINUS_32, w[1] * TWO_POW_MINUS_32, w[2] * TWO_POW_MINUS_32, w[3] * TWO_POW_MINUS_32


@jit
def _fill_words(seed, domain, epoch, samples, view, block, out):
    for i in range(len(samples)):
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = words4(seed, domain, epoch, samples[i], view, block)


def words_array(seed: int, domain: int, epoch: int, samples: npt.ArrayLike, view: int, block: int) -> np.ndarray:
    """The four uint32 words of one block for many samples at once: (N,) sample ids → (N, 4)."""
    ids = np.ascontiguousarray(samples, np.int64)
    words = np.empty((len(ids), 4), np.uint32)
    _fill_words(np.uint64(seed), domain, epoch, ids, view, block, words)
    return words


def random_keys(seed: int, domain: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """A random 64-bit key for each id, (N,) uint64: sorted by it, the ids are shuffled."""
    words = words_array(seed, domain, epoch, ids, 0, 0)
    return words[:, 0].astype(np.uint64) << _SHIFT | words[:, 1]
