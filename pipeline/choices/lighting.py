"""Lighting, the colour noise of AlexNet (Krizhevsky 2012, section 4.1): one offset of red, green and blue an image.

An offset is a sum of the principal components of ImageNet's colours, each with a normal weight. It is added to values
in [0, 1], between ToTensor and Normalize, and nothing is clipped. So it can be added to a finished, normalized view,
divided by the standard deviation: whichever loader and device made the view, the noise is the same.
"""

import numpy as np

from pipeline.choices.rng import DOMAIN_LIGHTING, TWO_POW_MINUS_32, words_array

# MMSelfSup v0.9.0, mmselfsup/datasets/pipelines/transforms.py, lines 384 to 392: a row a channel, a column a component.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def draw_lighting(seed: int, epoch: int, samples: np.ndarray, strength: float) -> np.ndarray:
    """(B, 3) float32: what is added to the values, in [0, 1], of each of these samples (B,) in this epoch.

    `strength` is the standard deviation of the components' weights.
    """
    u = words_array(seed, DOMAIN_LIGHTING, epoch, samples, 0, 0) * TWO_POW_MINUS_32
    # Box and Muller: two uniforms give the radius and the angle of two normal numbers; the fourth is not needed.
    radius = np.sqrt(-2 * np.log(1 - u[:, ::2]))  # 1 - u, because u may be 0 and is never 1
    angle = 2 * np.pi * u[:, 1::2]
    weights = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 4)[:, :3]
    return ((strength * weights * EIGENVALUES) @ EIGENVECTORS.T).astype(np.float32)
