"""The plan of a masked step: which tokens of each sample are visible, and where every token went.

`token_mask` makes a plan from a map of scores in one kernel; `TokenMask` is the plan, read by every later stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maefast.ops import _checks, _dispatch, _registry

TRITON_TOKENS = 16384  # the longest row that the Triton kernel sorts


@dataclass(frozen=True, eq=False)
class TokenMask:
    """Which of N tokens of each of B samples are visible, packed, so that samples may keep different numbers.

    Flat indices are ``b * N + n``. Packed rows stand sample by sample.

    Attributes:
        batch: B. num_tokens: N.
        keep: the visible count common to all samples, or None where the counts differ.
        visible: int32 [T], flat indices of the visible tokens. masked: int32 [M], of the others.
        slot: int32 [B*N], the inverse: ``t >= 0`` where the token is row t of `visible`, ``~m`` (that is,
            ``-m - 1``) where it is row m of `masked`.
        cu_visible, cu_masked: int32 [B+1], where each sample's rows start.
        max_visible, max_masked: the largest count in the batch, known on the host.
    """

    batch: int
    num_tokens: int
    keep: int | None
    visible: Tensor
    masked: Tensor
    slot: Tensor
    cu_visible: Tensor
    cu_masked: Tensor
    max_visible: int
    max_masked: int

    @property
    def total_visible(self) -> int:
        """T, the number of visible tokens in the batch."""
        return self.visible.shape[0]

    @property
    def total_masked(self) -> int:
        """M, the number of masked tokens in the batch."""
        return self.masked.shape[0]

    @property
    def device(self) -> torch.device:
        return self.slot.device

    @property
    def mask(self) -> Tensor:
        """bool [B, N], True where the token is masked (removed)."""
        return (self.slot < 0).view(self.batch, self.num_tokens)

    @property
    def ids_keep(self) -> Tensor:
        """int64 [B, keep]: positions of the visible tokens in plan order, as MAE's ``ids_keep``. Uniform plans."""
        return self._positions(self.visible, self._uniform("ids_keep"))

    @property
    def ids_masked(self) -> Tensor:
        """int64 [B, N - keep]: positions of the masked tokens in plan order. Uniform plans."""
        return self._positions(self.masked, self.num_tokens - self._uniform("ids_masked"))

    @property
    def ids_restore(self) -> Tensor:
        """int64 [B, N]: rank of each token in its sample, visible ones first, as MAE's ``ids_restore``."""
        slot = self.slot.view(self.batch, self.num_tokens).long()
        first_visible = self.cu_visible[:-1, None]
        first_masked = self.cu_masked[:-1, None]
        count = self.cu_visible[1:, None] - first_visible
        return torch.where(slot >= 0, slot - first_visible, ~slot - first_masked + count)

    def _uniform(self, what: str) -> int:
        if self.keep is None:
            raise ValueError(f"{what} needs a uniform plan; here the samples keep different numbers of tokens")
        return self.keep

    def _positions(self, flat: Tensor, count: int) -> Tensor:
        start = torch.arange(self.batch, device=self.device)[:, None] * self.num_tokens
        return flat.view(self.batch, count).long() - start

    def complement(self) -> TokenMask:
        """The plan with visible and masked exchanged; no copy but `slot`."""
        return TokenMask(
            batch=self.batch,
            num_tokens=self.num_tokens,
            keep=None if self.keep is None else self.num_tokens - self.keep,
            visible=self.masked,
            masked=self.visible,
            slot=~self.slot,
            cu_visible=self.cu_masked,
            cu_masked=self.cu_visible,
            max_visible=self.max_masked,
            max_masked=self.max_visible,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenMask:
        """The same plan on another device."""
        fields = dict(vars(self))
        for name in ("visible", "masked", "slot", "cu_visible", "cu_masked"):
            fields[name] = fields[name].to(device, non_blocking=non_blocking)
        return TokenMask(**fields)

    def __repr__(self) -> str:
        kept = f"keep={self.keep}" if self.keep is not None else f"ragged, {self.total_visible} visible"
        return f"TokenMask(batch={self.batch}, num_tokens={self.num_tokens}, {kept}, device={self.device})"

    # --- makers ---------------------------------------------------------------------------------------------

    @staticmethod
    def from_scores(scores: Tensor, keep: int | Sequence[int] | Tensor, **kwargs) -> TokenMask:
        """The `keep` lowest scores of each row are visible; see `token_mask`."""
        return token_mask(scores, keep, **kwargs)

    @staticmethod
    def all_visible(batch: int, num_tokens: int, device: torch.device | str = "cpu") -> TokenMask:
        """A plan that masks nothing, for encoding whole samples."""
        _check_size(batch, num_tokens)
        device = _checks.device("device", device)
        flat = torch.arange(batch * num_tokens, dtype=torch.int32, device=device)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_tokens
        slot = flat.view(-1)  # torch.compile refuses one tensor in two places of an autograd.Function
        return TokenMask(batch, num_tokens, num_tokens, flat, flat[:0], slot, cu, torch.zeros_like(cu), num_tokens, 0)

    @staticmethod
    def from_bool(masked: Tensor, keep: int | Sequence[int] | None = None, **kwargs) -> TokenMask:
        """From a boolean map [B, N], True = masked. Rows are ordered by position.

        Counting the visible tokens costs one host sync on a GPU, unless `keep` (one count, or one a sample) is
        given; a `keep` that contradicts the map raises (on a GPU as a device-side assertion, without a sync).
        """
        _checks.tensor("masked", masked, ndim=2, floating=False)
        if masked.dtype is not torch.bool:
            raise TypeError(f"masked must be a bool tensor (True = masked), got {masked.dtype}")
        _check_map("masked", masked)
        counts = (~masked).sum(1)
        if keep is None:
            if masked.device.type == "meta":
                raise ValueError("masked has no values to count (a meta tensor): give keep")
            keep = counts
        else:
            keep = _counts(keep, *masked.shape)
            want = _integers(keep, masked.device) if isinstance(keep, list) else keep
            _checks.holds(counts == want, "from_bool: `keep` does not match the number of False entries in the map")
        return token_mask(masked.float(), keep, order="position", **kwargs)

    @staticmethod
    def from_indices(indices: Tensor | Sequence[Tensor], num_tokens: int, **kwargs) -> TokenMask:
        """From the positions of the visible tokens: int [B, keep], or a list of B vectors of any lengths.

        The given order is kept; masked tokens are ordered by position. Raises for positions outside
        [0, num_tokens) and for repeated ones (on a GPU as a device-side assertion, without a sync).
        """
        rows = list(indices.unbind(0)) if isinstance(indices, Tensor) and indices.ndim == 2 else indices
        if not isinstance(rows, (list, tuple)) or not rows:
            raise ValueError("indices must be an int tensor [B, keep] or a non-empty list of int vectors")
        for row in rows:
            _checks.tensor("indices", row, ndim=1, floating=False)
            if row.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"indices must be int32 or int64, got {row.dtype}")
            if row.device != rows[0].device:
                raise ValueError(f"indices lie on {rows[0].device} and on {row.device}: move them to one device")
        _check_size(len(rows), num_tokens)
        counts = [row.shape[0] for row in rows]
        if max(counts) > num_tokens:
            raise ValueError(f"indices keep {max(counts)} of {num_tokens} tokens: keep must not exceed num_tokens")
        device = rows[0].device
        flat = torch.cat([row.long() for row in rows])
        sample = torch.repeat_interleave(
            torch.arange(len(rows), device=device), _integers(counts, device), output_size=len(flat)
        )
        inside = (flat >= 0) & (flat < num_tokens)
        _checks.holds(inside, f"indices: a position lies outside [0, {num_tokens})")
        flat = torch.where(inside, flat, 0) + sample * num_tokens
        uses = torch.zeros(len(rows) * num_tokens, dtype=torch.int32, device=device)
        _checks.holds(
            uses.index_add(0, flat, torch.ones_like(flat, dtype=torch.int32)) <= 1,
            "indices: a position is repeated",
        )
        # Ranks as scores: the visible ones in the order given, then the rest, tied and so by position.
        rank = torch.cat([torch.arange(count, device=device, dtype=torch.float32) for count in counts])
        scores = torch.full((len(rows) * num_tokens,), float(num_tokens), device=device)
        scores = scores.index_copy(0, flat, rank).view(len(rows), num_tokens)
        uniform = counts[0] if min(counts) == max(counts) else counts
        return token_mask(scores, uniform, order="score", **kwargs)

    @staticmethod
    def from_ids_restore(ids_restore: Tensor, keep: int | Sequence[int], **kwargs) -> TokenMask:
        """From MAE's ``ids_restore`` int [B, N] (rank of every token): ranks below `keep` are visible."""
        _checks.tensor("ids_restore", ids_restore, ndim=2, floating=False)
        if ids_restore.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids_restore must be int32 or int64, got {ids_restore.dtype}")
        _check_map("ids_restore", ids_restore)
        ranks = torch.arange(ids_restore.shape[1], device=ids_restore.device)
        ordered = ids_restore.sort(1).values
        _checks.holds(ordered == ranks, "ids_restore: a row is not a permutation of 0..N-1")
        return token_mask(ids_restore.float(), keep, order="score", **kwargs)


def _check_size(batch: int, num_tokens: int) -> None:
    """Sizes of a plan, given by the caller."""
    for name, value in (("batch", batch), ("num_tokens", num_tokens)):
        if isinstance(value, bool) or not isinstance(value, _checks.INT):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if batch < 1 or num_tokens < 1:
        raise ValueError(
            f"a plan needs at least one sample and one token, got batch = {batch}, num_tokens = {num_tokens}"
        )
    if batch * num_tokens >= 2**31:
        raise ValueError(
            f"batch = {batch} x num_tokens = {num_tokens}: flat indices are int32, so B*N must stay below 2**31"
        )


def _check_map(name: str, value: Tensor) -> None:
    """The size of a map [B, N] that a plan is made from."""
    batch, num_tokens = value.shape
    if batch < 1 or num_tokens < 1:
        raise ValueError(f"{name} must have at least one sample and one token, got shape {tuple(value.shape)}")
    if batch * num_tokens >= 2**31:
        raise ValueError(f"{name} is {batch} x {num_tokens}: flat indices are int32, so B*N must stay below 2**31")


def _counts(keep: int | Sequence[int] | Tensor, batch: int, num_tokens: int) -> int | list[int]:
    """Host counts; a tensor on a GPU costs one sync here."""
    if isinstance(keep, Tensor):
        if keep.is_floating_point() or keep.dtype is torch.bool or keep.shape not in ((), (batch,)):
            raise ValueError(f"keep must be an int tensor of shape [{batch}], got {keep.dtype} {tuple(keep.shape)}")
        if keep.device.type == "meta" or keep.layout is not torch.strided:
            raise ValueError(f"keep must hold values, got a tensor on {keep.device} of layout {keep.layout}")
        keep = keep.tolist()
    if isinstance(keep, (list, tuple)):
        counts = list(keep)
        if len(counts) != batch:
            raise ValueError(f"keep has {len(counts)} counts for a batch of {batch}")
    else:
        counts = [keep]
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"keep must be an int, or ints, one a sample; got {count!r} ({type(count).__name__})")
        if not 0 <= count <= num_tokens:
            raise ValueError(f"keep must lie in [0, {num_tokens}] (the number of tokens), got {count}")
    return counts[0] if min(counts) == max(counts) else counts


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 [n] of numbers that the host knows; the host does not wait."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        return _captured_integers(values, device)
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def _captured_integers(values: Sequence[int], device: torch.device) -> Tensor:
    """The same inside a CUDA graph, which cannot hold a copy from pageable memory, and would read a pinned page again
    at every replay, long after it was freed. Here the numbers are arguments of kernels, about a hundred to a launch."""
    out = torch.zeros(len(values), dtype=torch.int32, device=device)
    torch._foreach_add_(list(out.unbind()), list(values))
    return out


def token_mask(
    scores: Tensor,
    keep: int | Sequence[int] | Tensor,
    *,
    order: str = "score",
    backend: str | None = None,
) -> TokenMask:
    """Make a plan from scores: in each row the `keep` lowest scores are visible.

    The visible set and its order are those of ``torch.argsort(scores, dim=1, stable=True)`` (ties by index, NaN
    last), as in MAE (He et al., 2021), where the scores are uniform noise.

    Args:
        scores: [B, N], float32, float16, bfloat16 (float64: reference and cpu).
        keep: visible tokens a sample: one int, or B ints. An int tensor on a GPU costs one host sync. In a CUDA graph
            the counts are those of the capture.
        order: "score" packs tokens in ascending score (MAE's order), "position" in ascending index.
        backend: force a backend for this call.

    Returns:
        TokenMask.

    Raises:
        TypeError, ValueError: wrong dtype or shape, empty batch, keep outside [0, N], B*N of 2**31 or more.
    """
    _checks.tensor("scores", scores, ndim=2)
    batch, num_tokens = scores.shape
    _check_map("scores", scores)
    _checks.one_of("order", order, ("score", "position"))
    counts = _counts(keep, batch, num_tokens)
    device = scores.device
    if isinstance(counts, list):
        cu = [0]
        for count in counts:
            cu.append(cu[-1] + count)
        total, most, least = cu[-1], max(counts), min(counts)
        cu_visible = _integers(cu, device)
    else:
        total, most, least = batch * counts, counts, counts
        cu_visible = torch.arange(batch + 1, dtype=torch.int32, device=device) * counts
    cu_masked = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_tokens - cu_visible

    name = _dispatch.choose("token_mask", device.type, scores.dtype, backend, num_tokens <= TRITON_TOKENS)
    run = token_mask_reference if name == "reference" else _registry.raw("token_mask", name)
    visible, masked, slot = run(scores.detach().contiguous(), cu_visible, total, order == "position")
    return TokenMask(
        batch=batch,
        num_tokens=num_tokens,
        keep=None if isinstance(counts, list) else counts,
        visible=visible,
        masked=masked,
        slot=slot,
        cu_visible=cu_visible,
        cu_masked=cu_masked,
        max_visible=most,
        max_masked=num_tokens - least,
    )


def token_mask_reference(
    scores: Tensor, cu_visible: Tensor, total_visible: int, by_position: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: (visible [T], masked [M], slot [B*N]), all int32. See `token_mask`."""
    batch, num_tokens = scores.shape
    ranks = torch.arange(num_tokens, device=scores.device).expand(batch, num_tokens)
    first = cu_visible[:-1, None].long()  # packed row of each sample's first visible token
    count = cu_visible[1:, None].long() - first
    first_masked = torch.arange(batch, device=scores.device)[:, None] * num_tokens - first

    ids = scores.sort(dim=1, stable=True).indices  # token at each rank
    rank = torch.empty_like(ids).scatter_(1, ids, ranks)  # rank of each token
    if by_position:  # keep the set, sort each side by index
        ids = (rank >= count).to(torch.uint8).sort(dim=1, stable=True).indices
        rank = torch.empty_like(ids).scatter_(1, ids, ranks)

    slot = torch.where(rank < count, first + rank, ~(first_masked + rank - count))
    row = torch.where(ranks < count, first + ranks, total_visible + first_masked + ranks - count)
    flat = ids + torch.arange(batch, device=scores.device)[:, None] * num_tokens
    packed = torch.empty_like(flat.view(-1)).scatter_(0, row.reshape(-1), flat.view(-1)).int()
    return packed[:total_visible].clone(), packed[total_visible:].clone(), slot.view(-1).int()
