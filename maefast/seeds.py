"""Random numbers as a function of *what* they are for, never of what was drawn before.

Every draw of a run comes from a counter-based generator (Philox, Salmon et al. 2011) addressed by
(seed, purpose, a, b). So a resumed run needs no replay, the number of workers does not matter, and two
processes with a batch of b see exactly the samples and masks of one process with a batch of 2b.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

# Purposes. The numbers are part of the format: changing one changes every run.
SHUFFLE, AUGMENT, MASK, PICTURE, MODEL, SAMPLE, PROBE, STREAM = 1, 2, 3, 4, 5, 6, 7, 8


def generator(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Generator:
    """An independent generator for (seed, purpose, a, b), all non-negative and below 2**63.

    (a, b) are the high words of Philox's 256-bit counter, so streams cannot overlap before 2**64 draws.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, a, b, 0]))


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the `count` samples in `epoch`, int64 [count]."""
    return generator(seed, SHUFFLE, epoch).permutation(count)


def mask_noise(seed: int, position: int, count: int, purpose: int = MASK) -> np.ndarray:
    """Masking noise of the sample at `position` of the run, uniform float32 [count]."""
    return generator(seed, purpose, position).random(count, dtype=np.float32)


class Draw:
    """What a recipe's `prepare` draws from: numbers for each sample of a batch, a function of (seed, what they are for,
    the sample's place in the run) alone. So they are the same on any device, in any number of processes, whether they
    are drawn ahead or again, and after a resume.

    Args:
        seed: of the run. key: int [B], each sample's place in the run.
        purpose: MASK while training; PICTURE for the pictures on the way, whose keys are their numbers.
    """

    def __init__(self, seed: int, key: Sequence[int] | np.ndarray, purpose: int = MASK) -> None:
        self.seed, self.key, self.purpose = seed, key, purpose

    def uniform(self, what: str, count: int, device: torch.device | str = "cpu") -> Tensor:
        """float32 [B, count] in [0, 1), without waiting for the device. `what` names the use, as "mask": each has a
        stream of its own, and asking again gives the same numbers. Those for "mask" are `mask_noise`."""
        stream = _stream(what)
        numbers = torch.empty(len(self.key), count)
        rng = generator(self.seed, self.purpose, 0, stream)
        start = rng.bit_generator.state  # set anew for each sample, in a third of the time of making generators
        for place, row in zip(self.key, numbers.numpy()):
            start["state"]["counter"][1] = place
            rng.bit_generator.state = start
            rng.random(dtype=np.float32, out=row)
        if torch.device(device).type == "cuda":  # from pageable memory the copy could wait
            numbers = numbers.pin_memory()
        return numbers.to(device, non_blocking=True)

    def shared(self, what: str) -> np.random.Generator:
        """For what all samples of a batch have in common: a function of the first one's place in the run."""
        return generator(self.seed, self.purpose, int(self.key[0]), _stream(what))


def _stream(what: str) -> int:
    """A number below 2**56 for a name; 0 for "mask". Part of the format, as the purposes are."""
    return 0 if what == "mask" else int.from_bytes(blake2b(what.encode(), digest_size=7).digest(), "little")


def torch_seed(seed: int, step: int, rank: int) -> int:
    """Seed for torch's global generator before a step, for models that draw inside (dropout, drop path)."""
    return int(generator(seed, MODEL, step, rank).integers(0, 2**63 - 1))
