"""The whole model on the Triton kernels, in the interpreter: a process of its own, since the choice holds for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import maefast
from tests.models.common import gradients, inputs, largest_error, small

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.test_mae_triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 3


def main() -> None:
    """float32 on Triton against the float64 reference: masked, full and ragged."""
    import torch

    sizes = {"norm_pix_loss": True, "positions": "learned", "depth": 1, "decoder_depth": 1}
    model, exact = small(torch.float32, **sizes), small(torch.float64, **sizes)
    images, noise = inputs(model, 2)
    for ratio, pred in ((0.75, "masked"), (0.75, "full"), ([0.75, 0.25], "masked")):
        model.zero_grad()
        exact.zero_grad()
        with maefast.backend("triton"):
            loss = model(images, ratio, noise, pred=pred)[0]
            loss.backward()
        want = exact(images.double(), ratio, noise, pred=pred)[0]
        want.backward()
        error, name = largest_error({k: g.double() for k, g in gradients(model).items()}, gradients(exact))
        assert abs(loss.item() - want.item()) < 1e-6 * want.item(), (loss.item(), want.item())
        assert error < 1e-5, (error, name)
        print(f"equal: ratio {ratio}, pred {pred}")


if __name__ == "__main__":
    main()
