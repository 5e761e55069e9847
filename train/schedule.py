"""The learning rate of every step, as a share of its peak: a pure function, so a resumed run needs no state."""

import math

FINAL_SHARE = 0.001  # the cosine ends at this share of the peak (Zbontar 2021, section 2.2)


def lr_share(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine from 1 to FINAL_SHARE, which it nears but never runs at.

    A run no longer than its warm-up ends on the way up.
    """
    if step < warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cosine + FINAL_SHARE * (1 - cosine)
