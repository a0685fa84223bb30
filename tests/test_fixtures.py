"""What every test may rely on."""

from __future__ import annotations

import torch

from tests.kernels import support


def test_float32_is_float32():
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_bound_is_that_of_where_a_result_was_computed(capsys):
    class OnADevice(torch.Tensor):
        is_cuda = True

    here, there = torch.ones(4), torch.ones(4).as_subclass(OnADevice)
    assert (support.bound(here), support.bound(there)) == (1e-6, 3e-6)
    for dtype in (torch.float16, torch.bfloat16):
        assert support.bound(here, dtype) == support.bound(there, dtype)
    support.assert_close(here * (1 + 5e-7), here, "half a millionth")
    assert "half a millionth: relative error" in capsys.readouterr().out
