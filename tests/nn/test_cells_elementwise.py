"""Every elementwise function of torch on `Cells` equals the dense function at the sites that are seen."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maefast import Cells, masking
from maefast.nn import cell_elementwise
from maefast.nn.cells import ELEMENTWISE, HANDLERS, complete
from maefast.ops import CellMask

SHAPE = (3, 4, 6, 4)
DTYPES = (torch.float64, torch.int64, torch.bool)
# X, Y, Z are maps, C is one of conditions: whatever the dense function accepts is compared.
PATTERNS = (
    *("X", "XY", "XYZ", "CXY", "XCY"),
    *(("X", 0.5), ("X", 2), ("X", 0.1, 0.5), (2, "X"), ("X", "C", 0.5), ("X", "Y", 0.5), ("X", torch.float32)),
)
METHODS = {getattr(Tensor, name): name for name in dir(Tensor) if callable(getattr(Tensor, name))}
RANDOM = cell_elementwise.RANDOM.split()

complete()
TABLE: dict[str, list] = {}
for function, base, changes in cell_elementwise.functions():
    if base not in RANDOM and f"{base}_" not in RANDOM and base != "empty_like":
        TABLE.setdefault(base, []).append((function, changes))


def plan() -> CellMask:
    return masking.cells(3, (3, 2), keep=[4, 1, 6], generator=torch.Generator().manual_seed(1))


def maps(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 0.8 + 0.1 for name in "XYZ"}
    if dtype is torch.int64:
        made = {name: (value * 9).long() for name, value in made.items()}
    if dtype is torch.bool:
        made = {name: value > 0.5 for name, value in made.items()}
    return {**made, "C": torch.rand(SHAPE, generator=generator) > 0.5}


def call(function, pattern, values: dict):
    args = [values[p] if isinstance(p, str) else p for p in pattern]
    if isinstance(args[0], Cells) and not isinstance(function, type) and function in METHODS:
        function = getattr(Cells, METHODS[function])  # Python lets no method of a tensor take anything else
    return function(*args)


def packed(value: Tensor, cells: CellMask) -> Tensor:
    return Cells.pack(value, cells).rows


def as_cells(values: dict, cells: CellMask) -> dict:
    return {name: Cells.pack(value, cells) for name, value in values.items()}


def accepted(function, base: str, changes: bool):
    """(dtype, pattern, the dense results) of every pattern that the dense function takes."""
    for dtype, pattern in itertools.product(DTYPES, PATTERNS):
        deprecated = base in ("add", "sub") and len(pattern) > 2  # (input, alpha, other)
        if deprecated or (changes and pattern[0] != "X"):
            continue
        try:
            out = call(function, pattern, maps(dtype))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            continue
        outs = out if isinstance(out, tuple) else (out,)
        if not all(isinstance(o, Tensor) and o.shape == SHAPE for o in outs):
            continue
        yield dtype, pattern, outs


@pytest.mark.parametrize("base", TABLE)
def test_equals_the_dense_function(base):
    cells = plan()
    for function, changes in TABLE[base]:
        count = 0
        for dtype, pattern, wants in accepted(function, base, changes):
            count += 1
            values = as_cells(maps(dtype), cells)
            out = call(function, pattern, values)
            outs = out if isinstance(out, tuple) else (out,)
            assert len(outs) == len(wants)
            for got, want in zip(outs, wants):
                assert got.dtype == want.dtype
                torch.testing.assert_close(got.rows, packed(want, cells), equal_nan=True, msg=f"{function} {pattern}")
            if changes:
                assert out is values["X"]
        assert count, f"no arguments were found that {function} accepts"


def gradients(function, pattern, cells: CellMask, sparse: bool) -> list[Tensor | None] | type | None:
    """Of X, Y, Z, C at the sites that are seen; the type of an error; None where the result has none."""
    weight = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaf = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in maps(torch.float64).items()}
    values = as_cells(leaf, cells) if sparse else {n: v.clone() for n, v in leaf.items()}
    try:
        out = call(function, pattern, values)
        out = out[0] if isinstance(out, tuple) else out
        if not out.requires_grad:
            return None
        out = out.rows if sparse else packed(out, cells)
        (torch.nan_to_num(out) * packed(weight, cells)).sum().backward()
    except RuntimeError as error:  # such as "derivative is not implemented"
        return type(error)
    return [None if v.grad is None else packed(v.grad, cells) for v in leaf.values()]


@pytest.mark.parametrize("base", [base for base in TABLE if base != "sgn"])
def test_gradients_equal_those_of_the_dense_function(base):
    cells = plan()
    for function, changes in TABLE[base]:
        for dtype, pattern, wants in accepted(function, base, changes):
            if dtype is not torch.float64 or changes or not wants[0].is_floating_point():
                continue
            want, got = (gradients(function, pattern, cells, sparse) for sparse in (False, True))
            if isinstance(want, list):
                assert isinstance(got, list), (function, pattern, got)
                torch.testing.assert_close(got, want, equal_nan=True, msg=f"{function} {pattern}")
            else:
                assert got == want, (function, pattern)


@pytest.mark.filterwarnings("ignore")  # of functions that are called with whatever there is
def test_nothing_elementwise_is_missing():
    """Functions that run on operators alone which torch tags as pointwise, and that the table does not have."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    missing = set()
    for function in torch.overrides.get_testing_overrides():
        if function in HANDLERS or function in ELEMENTWISE:
            continue
        for dtype, pattern in itertools.product(DTYPES, PATTERNS):
            called: list = []
            try:
                with Recorded():
                    out = call(function, pattern, maps(dtype))
            except Exception:  # whatever refuses these arguments
                continue
            outs = out if isinstance(out, tuple) else (out,)
            kept = outs and all(isinstance(o, Tensor) and o.shape == SHAPE for o in outs)
            if kept and called and all(torch.Tag.pointwise in op.tags for op in called):
                missing.add(function.__name__)
    assert missing <= {"kl_div", "margin_ranking_loss", "sym_sum"}  # losses, with `reduction` as a number
