"""Random bad calls of every public op and sampler: each works or raises a TypeError or ValueError that names an
argument. No other exception, whatever is given where."""

from __future__ import annotations

import re
import zlib
from random import Random

import pytest
from torch import Tensor

from ..budget import examples
from .hostile import VALID, bad_call, parameters, targets

TARGETS = targets()
CALLS = examples(300, 1500)


def told(value: object) -> str:
    """A value of a call that failed, short."""
    if isinstance(value, Tensor):
        return f"<{value.dtype} {list(value.shape)} {value.device} {value.layout}>"
    return repr(value)[:60]


@pytest.mark.parametrize("name", TARGETS)
def test_valid_calls(name):
    assert name in VALID, f"{name} has no valid call: add one to VALID in tests/ops/hostile.py, so that it is fuzzed"
    for make in VALID[name]:
        given = make()
        assert set(given) <= set(parameters(TARGETS[name]))
        TARGETS[name](**given)


def test_nothing_else_has_a_call():
    assert set(VALID) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_bad_calls(name):
    rng = Random(zlib.crc32(name.encode()))
    function = TARGETS[name]
    names = re.compile(rf"\b({'|'.join(parameters(function))})\b")
    refused = 0
    for _ in range(CALLS):
        given = bad_call(rng, name, function)
        try:
            function(**given)
        except (TypeError, ValueError) as error:
            refused += 1
            unclear = None if names.search(str(error)) else error
        except Exception as error:
            unclear = error
        else:
            continue
        if unclear is not None:
            shown = ", ".join(f"{what}={told(value)}" for what, value in given.items())
            raise AssertionError(f"{name}({shown}): {type(unclear).__name__}: {unclear}") from unclear
    assert refused > CALLS / 4, "most of these calls are meant to be wrong"
