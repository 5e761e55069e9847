"""Philox4x32-10 a second time, in NumPy: what the compiled one and Triton's are held to."""

import numpy as np

M0, M1, W0, W1 = np.uint64([0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85])
MASK, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32_array(counter, key) -> np.ndarray:
    """counter (..., 4) and key (..., 2), uint32 → words (..., 4), uint32."""
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.asarray(key)[..., i].astype(np.uint64) for i in range(2))
    for _ in range(10):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & MASK, (p0 >> SHIFT) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)
