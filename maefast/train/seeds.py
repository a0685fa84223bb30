"""Random numbers as a function of *what* they are for, never of what was drawn before.

Every draw of a run comes from a counter-based generator (Philox, Salmon et al. 2011) addressed by
(seed, purpose, a, b). So a resumed run needs no replay, the number of workers does not matter, and two
processes with a batch of b see exactly the samples and masks of one process with a batch of 2b.
"""

from __future__ import annotations

import numpy as np

# Purposes. The numbers are part of the format: changing one changes every run.
SHUFFLE, AUGMENT, MASK, PICTURE, MODEL, SAMPLE = 1, 2, 3, 4, 5, 6


def generator(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Generator:
    """An independent generator for (seed, purpose, a, b), all non-negative and below 2**63.

    (a, b) are the high words of Philox's 256-bit counter, so streams cannot overlap before 2**64 draws.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, a, b, 0]))


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the `count` images in `epoch`, int64 [count]."""
    return generator(seed, SHUFFLE, epoch).permutation(count)


def mask_noise(seed: int, position: int, patches: int, purpose: int = MASK) -> np.ndarray:
    """Masking noise of the sample at `position` of the run, uniform float32 [patches]."""
    return generator(seed, purpose, position).random(patches, dtype=np.float32)


def torch_seed(seed: int, step: int, rank: int) -> int:
    """Seed for torch's global generator before a step, for models that draw inside (dropout, drop path)."""
    return int(generator(seed, MODEL, step, rank).integers(0, 2**63 - 1))
