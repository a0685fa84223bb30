"""AdamW's moments in bfloat16: computed in float32, stored rounded at random, without a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maefast.ops.adamw import update

AT_ONCE = 2**24  # elements whose moments stand in float32 while they are computed


def round_at_random(values: Tensor, step: Tensor) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, with the chances that make the mean exact.

    To the nearest one, an average that changes by less than half a unit in its last place (1/512 to 1/256 of it) would
    stand still: with a decay of 0.999 v never falls again. The dice are a hash (the end of Appleby's MurmurHash3) of
    the value and the step, so they are the same however tensors are cut, ordered or spread over processes, and no state
    of a generator must be kept. What bfloat16 holds, infinities and NaN stay.

    Args:
        values: float32, any shape. step: one number, on its device.
    """
    bits = values.view(torch.int32)
    dice = bits ^ (step.reshape(()).to(torch.int32) * _int32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        dice ^= (dice >> shift) & (0xFFFFFFFF >> shift)  # int32 shifts its sign in
        dice *= _int32(factor)
    dice ^= dice >> 16
    dice &= 0xFFFF
    rounded = dice.add_(bits).bitwise_and_(_int32(0xFFFF0000)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _int32(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def update_narrow(lists: tuple[list[Tensor], ...], options: dict[str, Any]) -> None:
    """`maefast.ops.adamw.update` of float32 parameters whose moments are bfloat16, a part after another.

    Args:
        lists: params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs (or empty), shadows (or empty).
    """
    for params, grads, averages, squares, steps, highests, shadows in _parts(lists):
        stored = (averages, squares, highests)
        wide = [[tensor.float() for tensor in tensors] for tensors in stored]
        update(params, grads, *wide[:2], steps, max_exp_avg_sqs=wide[2], shadows=shadows, **options)
        for moments, results in zip(stored, wide):
            for moment, result, step in zip(moments, results, steps):
                moment.copy_(round_at_random(result, step))


def _parts(lists: tuple[list[Tensor], ...]) -> Iterator[list[list[Tensor]]]:
    first = size = 0
    params = lists[0]
    for last, param in enumerate(params):
        size += param.numel()
        if size >= AT_ONCE or last == len(params) - 1:
            yield [tensors[first : last + 1] for tensors in lists]
            first, size = last + 1, 0
