"""A library's attention inside an autograd node of ours: its own graph, whose tensors the node keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class LibraryAttention:
    """Forward and backward of a function of `_attention_table.LIBRARIES`.

    The graph that the library makes is cut from everything around it, and what it would keep is `taken` for the
    outer node's `save_for_backward`: so it is freed, offloaded or recomputed with all else.
    """

    def __init__(self, library: Callable, batch: int, scale: float) -> None:
        self.library, self.batch, self.scale = library, batch, scale
        self.kept: list[Tensor] = []
        self._ends: tuple[GradientEdge, list[GradientEdge]] | None = None
        self._now: list[Tensor] | None = None
        self._shape, self._dense = torch.Size(), True  # of the output

    def forward(self, q: Tensor, kv: Tensor | None, cu_q, cu_k, max_q: int, max_k: int) -> Tensor:
        """Rows q [T, 3, H, d], or q [Tq, H, d] with kv [Tk, 2, H, d] -> [Tq, H, d]."""

        def keep(t: Tensor) -> int:
            self.kept.append(t.detach())
            return len(self.kept) - 1

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda at: self._now[at]):
            start = torch.zeros((), requires_grad=True, device=q.device)
            parts = [t if t is None else _Cut.apply(t, start) for t in self._dense_rows(cu_q, q, kv)]
            out = self.library(*parts, cu_q, cu_k, max_q, max_k, self.scale, False)
            self._ends = get_gradient_edge(out), [get_gradient_edge(t) for t in parts if t is not None]
        self._shape, self._dense = out.shape, cu_q is None
        out = out.detach()
        return out.flatten(0, 1) if self._dense else out

    def alone(self, q: Tensor, kv: Tensor | None, cu_q, cu_k, max_q: int, max_k: int) -> Tensor:
        """`forward` where no backward follows."""
        out = self.library(*self._dense_rows(cu_q, q, kv), cu_q, cu_k, max_q, max_k, self.scale, False)
        return out if cu_q is not None else out.flatten(0, 1)

    def _dense_rows(self, cu_q: Tensor | None, *parts: Tensor | None) -> list[Tensor | None]:
        return [t if t is None or cu_q is not None else t.unflatten(0, (self.batch, -1)) for t in parts]

    def taken(self) -> list[Tensor]:
        """What is to be kept, handed over."""
        kept, self.kept = self.kept, []
        return kept

    def backward(self, grad: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gradients of q and kv, as rows; `kept` as the outer node kept it."""
        out, parts = self._ends
        self._now = kept
        try:
            grads = torch.autograd.grad(out, parts, grad.view(self._shape), retain_graph=True)
        finally:
            self._now = None
        grads = [t.reshape(-1, *t.shape[2:]) if self._dense else t for t in grads]
        return grads[0], grads[1] if len(grads) > 1 else None


class _Cut(torch.autograd.Function):
    """x, as the start of a graph that does not hold x."""

    @staticmethod
    def forward(ctx, x, start):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
