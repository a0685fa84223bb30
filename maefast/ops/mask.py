"""The plan of a masked step: which tokens of each sample are visible, and where every token went.

`token_mask` makes a plan from a map of scores in one kernel; `TokenMask` is the plan, read by every later stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maefast.ops import _checks, _dispatch, _registry
from maefast.ops._mask_arguments import (
    check_map,
    check_size,
    counted,
    counts_of,
    index_rows,
    integers,
    one_or_all,
    starts,
    sum_of,
)

_raw_op = _registry.family("mask")

TRITON_TOKENS = 16384  # the longest row that the Triton kernel sorts
ABSENT = -(2**31)  # the slot of a token that is neither visible nor masked; the kernels know it too


@dataclass(frozen=True, eq=False)
class TokenMask:
    """Which of N tokens of each of B samples are visible, packed, so that samples may keep different numbers.

    Flat indices are ``b * N + n``. Packed rows stand sample by sample. Tokens that are neither visible nor masked are
    absent: padding, missing channels, masked tokens that nobody predicts. Most plans have none.

    Attributes:
        batch: B. num_tokens: N.
        keep: the visible count common to all samples, or None where the counts differ.
        visible: int32 [T], flat indices of the visible tokens. masked: int32 [M], of the others.
        slot: int32 [B*N], the inverse: ``t >= 0`` where the token is row t of `visible`, ``~m`` (that is,
            ``-m - 1``) where it is row m of `masked`, ``ABSENT`` (-2**31) where it is absent.
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
    def total_absent(self) -> int:
        """How many tokens of the batch are neither."""
        return self.batch * self.num_tokens - self.total_visible - self.total_masked

    @property
    def hide(self) -> int | None:
        """The masked count common to all samples, or None where the counts differ."""
        return self.max_masked if self.max_masked * self.batch == self.total_masked else None

    @property
    def cu_present(self) -> Tensor:
        """int32 [B+1], where each sample starts among the visible and masked tokens of the batch."""
        return self.cu_visible + self.cu_masked

    @property
    def device(self) -> torch.device:
        return self.slot.device

    @property
    def mask(self) -> Tensor:
        """bool [B, N], True where the token is masked (removed)."""
        masked = self.slot < 0
        if self.total_absent:
            masked &= self.slot != ABSENT
        return masked.view(self.batch, self.num_tokens)

    @property
    def absent(self) -> Tensor:
        """bool [B, N], True where the token is neither visible nor masked."""
        return (self.slot == ABSENT).view(self.batch, self.num_tokens)

    @property
    def ids_keep(self) -> Tensor:
        """int64 [B, keep]: positions of the visible tokens in plan order, as MAE's ``ids_keep``. Uniform plans."""
        return self._positions(self.visible, _uniform("ids_keep", self.keep))

    @property
    def ids_masked(self) -> Tensor:
        """int64 [B, hide]: positions of the masked tokens in plan order. Plans that mask as many in each sample."""
        return self._positions(self.masked, _uniform("ids_masked", self.hide))

    @property
    def ids_restore(self) -> Tensor:
        """int64 [B, N]: rank of each token in its sample, visible ones first, as MAE's ``ids_restore``."""
        if self.total_absent:
            raise ValueError("ids_restore ranks every token; this plan leaves some absent")
        slot = self.slot.view(self.batch, self.num_tokens).long()
        first_visible = self.cu_visible[:-1, None]
        first_masked = self.cu_masked[:-1, None]
        count = self.cu_visible[1:, None] - first_visible
        return torch.where(slot >= 0, slot - first_visible, ~slot - first_masked + count)

    def _positions(self, flat: Tensor, count: int) -> Tensor:
        start = torch.arange(self.batch, device=self.device)[:, None] * self.num_tokens
        return flat.view(self.batch, count).long() - start

    def complement(self) -> TokenMask:
        """The plan with visible and masked exchanged; no copy but `slot`. Absent tokens stay absent."""
        slot = ~self.slot
        if self.total_absent:
            slot = torch.where(self.slot == ABSENT, self.slot, slot)
        return TokenMask(
            batch=self.batch,
            num_tokens=self.num_tokens,
            keep=self.hide,
            visible=self.masked,
            masked=self.visible,
            slot=slot,
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
        if self.total_absent:
            kept += f", {self.total_masked} masked, {self.total_absent} absent"
        return f"TokenMask(batch={self.batch}, num_tokens={self.num_tokens}, {kept}, device={self.device})"

    # --- makers ---------------------------------------------------------------------------------------------

    @staticmethod
    def from_scores(scores: Tensor, keep: int | Sequence[int] | Tensor, **kwargs) -> TokenMask:
        """The `keep` lowest scores of each row are visible; see `token_mask`."""
        return token_mask(scores, keep, **kwargs)

    @staticmethod
    def all_visible(batch: int, num_tokens: int, device: torch.device | str = "cpu") -> TokenMask:
        """A plan that masks nothing, for encoding whole samples."""
        check_size(batch, num_tokens)
        device = _checks.device("device", device)
        flat = torch.arange(batch * num_tokens, dtype=torch.int32, device=device)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_tokens
        slot = flat.view(-1)  # torch.compile refuses one tensor in two places of an autograd.Function
        return TokenMask(batch, num_tokens, num_tokens, flat, flat[:0], slot, cu, torch.zeros_like(cu), num_tokens, 0)

    @staticmethod
    def from_bool(
        masked: Tensor, keep: int | Sequence[int] | None = None, *, absent: Tensor | None = None, **kwargs
    ) -> TokenMask:
        """From a boolean map [B, N], True = masked. Rows are ordered by position.

        Counting the visible tokens costs one host sync on a GPU, unless `keep` (one count, or one a sample) is
        given; a `keep` that contradicts the map raises (on a GPU as a device-side assertion, without a sync).

        absent: bool [B, N], True where a token is neither visible nor masked, whatever `masked` says of it. Their
        number costs a sync unless `keep` and `hide` (as in `token_mask`) are given.
        """
        _checks.tensor("masked", masked, ndim=2, floating=False)
        if masked.dtype is not torch.bool:
            raise TypeError(f"masked must be a bool tensor (True = masked), got {masked.dtype}")
        check_map("masked", masked)
        if absent is None:
            keep = counted("keep", keep, ~masked, "False entries in the map")
            return token_mask(masked.float(), keep, order="position", **kwargs)
        _checks.tensor("absent", absent, ndim=2, floating=False)
        if absent.dtype is not torch.bool or absent.shape != masked.shape or absent.device != masked.device:
            raise ValueError(
                f"absent must be a bool tensor {list(masked.shape)} on {masked.device} like the map, got {absent.dtype}"
                f" {list(absent.shape)} on {absent.device}"
            )
        keep = counted("keep", keep, ~(masked | absent), "visible tokens")
        hide = counted("hide", kwargs.pop("hide", None), masked & ~absent, "masked tokens")
        # Equal scores go by index, so that score order is position order here, in one plan instead of two.
        return token_mask(torch.where(absent, 2.0, masked.float()), keep, hide=hide, order="score", **kwargs)

    @staticmethod
    def from_indices(
        indices: Tensor | Sequence[Tensor],
        num_tokens: int,
        *,
        masked: Tensor | Sequence[Tensor] | None = None,
        **kwargs,
    ) -> TokenMask:
        """From the positions of the visible tokens: int [B, keep], or a list of B vectors of any lengths.

        The given order is kept; masked tokens are ordered by position. With `masked`, positions given in the same way,
        those are the masked ones, in their order, and all others are absent. Raises for positions outside
        [0, num_tokens) and for repeated ones (on a GPU as a device-side assertion, without a sync).
        """
        rows = index_rows("indices", indices)
        check_size(len(rows), num_tokens)
        counts = [row.shape[0] for row in rows]
        if masked is not None:
            hidden = index_rows("masked", masked)
            if len(hidden) != len(rows) or hidden[0].device != rows[0].device:
                raise ValueError(
                    f"masked must have the {len(rows)} samples of indices on {rows[0].device}, got {len(hidden)} on"
                    f" {hidden[0].device}"
                )
            hide = one_or_all([row.shape[0] for row in hidden])
            both = TokenMask.from_indices([torch.cat(pair) for pair in zip(rows, hidden)], num_tokens, **kwargs)
            return _split(both, one_or_all(counts), hide)
        if max(counts) > num_tokens:
            raise ValueError(f"indices keep {max(counts)} of {num_tokens} tokens: keep must not exceed num_tokens")
        device = rows[0].device
        flat = torch.cat([row.long() for row in rows])
        sample = torch.repeat_interleave(
            torch.arange(len(rows), device=device), integers(counts, device), output_size=len(flat)
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
        dtype = _dtype_of_ranks(num_tokens)
        rank = torch.cat([torch.arange(count, device=device, dtype=dtype) for count in counts])
        scores = torch.full((len(rows) * num_tokens,), num_tokens, device=device, dtype=dtype)
        scores = scores.index_copy(0, flat, rank).view(len(rows), num_tokens)
        return token_mask(scores, one_or_all(counts), order="score", **kwargs)

    @staticmethod
    def from_ids_restore(ids_restore: Tensor, keep: int | Sequence[int], **kwargs) -> TokenMask:
        """From MAE's ``ids_restore`` int [B, N] (rank of every token): ranks below `keep` are visible."""
        _checks.tensor("ids_restore", ids_restore, ndim=2, floating=False)
        if ids_restore.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids_restore must be int32 or int64, got {ids_restore.dtype}")
        check_map("ids_restore", ids_restore)
        ranks = torch.arange(ids_restore.shape[1], device=ids_restore.device)
        ordered = ids_restore.sort(1).values
        _checks.holds(ordered == ranks, "ids_restore: a row is not a permutation of 0..N-1")
        return token_mask(ids_restore.to(_dtype_of_ranks(len(ranks))), keep, order="score", **kwargs)


def _dtype_of_ranks(num_tokens: int) -> torch.dtype:
    """That holds every rank exactly."""
    return torch.float32 if num_tokens <= 2**24 else torch.float64


def _uniform(what: str, count: int | None) -> int:
    if count is None:
        verb = "keep" if what == "ids_keep" else "mask"
        raise ValueError(f"{what} needs a uniform plan; here the samples {verb} different numbers of tokens")
    return count


def token_mask(
    scores: Tensor,
    keep: int | Sequence[int] | Tensor,
    *,
    hide: int | Sequence[int] | Tensor | None = None,
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
        hide: masked tokens a sample, counted like `keep`: the `hide` lowest scores of the others. What is left is
            absent. None: all others are masked.
        order: "score" packs tokens in ascending score (MAE's order), "position" in ascending index.
        backend: force a backend for this call.

    Returns:
        TokenMask.

    Raises:
        TypeError, ValueError: wrong dtype or shape, empty batch, keep outside [0, N], B*N of 2**31 or more.
    """
    _checks.tensor("scores", scores, ndim=2)
    batch, num_tokens = scores.shape
    check_map("scores", scores)
    _checks.one_of("order", order, ("score", "position"))
    counts = counts_of(keep, batch, num_tokens)
    name = _dispatch.choose("token_mask", scores.device.type, scores.dtype, backend, num_tokens <= TRITON_TOKENS)
    scores = scores.detach().contiguous()
    if hide is None:
        return _plan(scores, counts, order == "position", name)
    hide = counts_of(hide, batch, num_tokens, "hide")
    present = sum_of(counts, hide, batch)
    most = max(present) if isinstance(present, list) else present
    if most > num_tokens:
        raise ValueError(f"keep + hide must not exceed the {num_tokens} tokens, got {most}")
    plan = _split(_plan(scores, present, False, name), counts, hide)
    if order == "score":
        return plan
    # Equal scores go by index: so do these, state by state.
    state = torch.where(plan.slot >= 0, 0.0, torch.where(plan.slot == ABSENT, 2.0, 1.0)).view(batch, num_tokens)
    return _split(_plan(state, present, False, name), counts, hide)


def _plan(scores: Tensor, counts: int | list[int], by_position: bool, name: str) -> TokenMask:
    """The plan in which all others are masked, made by backend `name`."""
    batch, num_tokens = scores.shape
    cu_visible, total = starts(counts, batch, scores.device)
    cu_masked = torch.arange(batch + 1, dtype=torch.int32, device=scores.device) * num_tokens - cu_visible
    run = token_mask_reference if name == "reference" else _registry.raw("token_mask", name)
    visible, masked, slot = run(scores, cu_visible, total, by_position)
    most, least = (max(counts), min(counts)) if isinstance(counts, list) else (counts, counts)
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


def _split(plan: TokenMask, keep: int | list[int], hide: int | list[int]) -> TokenMask:
    """Of the visible tokens of `plan` the first `keep` of each sample stay visible and the next `hide` are masked; what
    it masked is absent."""
    batch, device = plan.batch, plan.device
    samples = torch.arange(batch, device=device)
    lists, begins = [], []
    for counts, skip in ((keep, None), (hide, keep)):
        cu, total = starts(counts, batch, device)
        sample = torch.repeat_interleave(samples, cu.diff(), output_size=total)
        shift = plan.cu_visible[:-1] - cu[:-1]  # from the own list to the plan's
        if skip is not None:
            shift = shift + begins[0].diff()
        lists.append(plan.visible[torch.arange(total, device=device) + shift[sample]])
        begins.append(cu)
    rank = plan.slot.view(batch, -1) - plan.cu_visible[:-1, None]  # among the visible ones of its sample
    count = begins[0].diff()[:, None]
    slot = torch.where(rank < count, rank + begins[0][:-1, None], ~(rank - count + begins[1][:-1, None]))
    slot = torch.where(plan.slot.view(batch, -1) >= 0, slot, ABSENT).view(-1)
    most = [max(counts) if isinstance(counts, list) else counts for counts in (keep, hide)]
    return TokenMask(
        batch=batch,
        num_tokens=plan.num_tokens,
        keep=None if isinstance(keep, list) else keep,
        visible=lists[0],
        masked=lists[1],
        slot=slot,
        cu_visible=begins[0],
        cu_masked=begins[1],
        max_visible=most[0],
        max_masked=most[1],
    )


@_raw_op(
    "token_mask(Tensor scores, Tensor cu_visible, SymInt total_visible, bool by_position) -> (Tensor, Tensor, Tensor)"
)
def _token_mask_fake(scores, cu_visible, total_visible, by_position):
    count = scores.shape[0] * scores.shape[1]
    new = lambda n: scores.new_empty((n,), dtype=torch.int32)  # noqa: E731
    return new(total_visible), new(count - total_visible), new(count)


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
