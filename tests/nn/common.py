"""What the tests of packed cells share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import Cells
from maefast.bench.peers.plain_sparse import Active, masked
from maefast.ops import CellMask


class Odd(nn.Module):
    """Whatever `run` does, in a module whose name a refusal gives."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


def assert_equals_masked(
    dense: nn.Module, sparse: nn.Module, images: Tensor, plan: CellMask, gradients: float = 1e-9
) -> None:
    """`sparse` on cells is `dense` with every layer multiplied by the mask: output, gradients, running statistics.

    `gradients`: their relative and absolute tolerance.
    """
    active = Active()
    active.set(~plan.mask[:, None])
    masked(dense, active)
    want = dense(images * active.map(images))
    out = sparse(Cells.pack(images, plan))
    assert out.shape == want.shape
    keep = active.map(want)
    torch.testing.assert_close(out.dense(), want * keep, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    (want * keep * weight).sum().backward()
    (out.dense() * weight).sum().backward()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=gradients, atol=gradients, msg=name)
    for (name, p), q in zip(sparse.named_buffers(), dense.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)
