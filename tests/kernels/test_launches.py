"""What every launch keeps to, seen without a GPU: the launchers run on meta tensors and their launches are recorded."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.kernels.support import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("compiled kernels only", allow_module_level=True)

from triton.runtime.jit import JITFunction

from maefast import kernels
from tests.kernels.compile_cases import CASES, ints, meta

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
MODULES = [f"{kernels.__name__}.{m.name}" for m in pkgutil.iter_modules(kernels.__path__)]


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, whether the device of its tensors was made the current one) of every launch from here on."""
    seen, guarded = [], []

    @contextmanager
    def guard(x):
        guarded.append(x)
        yield
        guarded.pop()

    def run(self, *args, grid, warmup, **kwargs):
        seen.append((self.fn.__name__, (*grid, 1, 1)[:3], bool(guarded)))

    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "guard"):
            monkeypatch.setattr(module, "guard", guard)
    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def fits(grid) -> bool:
    x, y, z = grid
    return 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16


@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.__name__)
def test_every_launch_has_its_device_and_a_possible_grid(launches, cases):
    for label, op, args in cases(True):
        before = len(launches)
        op(*args)
        assert len(launches) > before, label
        for kernel, grid, on_its_device in launches[before:]:
            assert on_its_device, f"{kernel} is launched on whatever device is current ({label})"
            assert fits(grid), f"{kernel}: grid {grid} ({label})"


def test_more_segments_than_a_grid_is_wide(launches):
    from maefast.kernels import cell_norm

    segments = 70_000
    x, cu, table, bias = meta(segments, 768), ints(segments + 1), meta(segments, 768), meta(768)
    cell_norm.segment_stats(x, cu, 1)
    cell_norm.norm_act(x, None, cu, 1, table, table, bias, 1)
    cell_norm.norm_act_sums(x, x, None, cu, 1, table, table, bias, 1)
    cell_norm.norm_act_backward(x, x, cu, 1, table, table, bias, None, None, 1)
    assert len(launches) == 6
    assert all(fits(grid) for _, grid, _ in launches)


def test_more_than_32_bits_are_refused():
    """Where a kernel counts in int32: an error, not a wrong number. See also `wide_cases`."""
    from maefast.kernels import depthwise, implicit_conv, pool

    x, table, taps = meta(2**25, 8, 8, 1), meta(2**25, 9), meta(9, 1)
    window = (2, 2), (2, 2), (0, 0)
    long, unit = meta(1, 1, 1, 2**16), ((1, 1), (1, 1), (0, 0), (1, 1))
    for op, *args in (
        (pool.max_pool_cells, x, table, *window),
        (pool.avg_pool_cells_backward, meta(2**25, 4, 4, 1), table, *window, True),
        (depthwise.depthwise, x, table, taps, None, False),
        (depthwise.depthwise_grad_weight, x, x, table, 3),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: .*at most 2\\^31 - 1 sites, got 2147483648"):
            op(*args)
    for op, *args in (
        (implicit_conv.implicit_conv, long, meta(1, 1), meta(1, 2**16, 2**16), None, *unit),
        (implicit_conv.implicit_conv_grad_x, long, meta(1, 1), meta(1, 2**16, 2**16), *unit),
        (implicit_conv.implicit_conv_grad_weight, long, long, meta(1, 1), *unit),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: .* elements of a weight, got 4294967296"):
            op(*args)


def test_float32_products_are_float32():
    """`tl.dot` rounds float32 to TF32 unless it is told otherwise."""
    for name in MODULES:
        source = Path(importlib.import_module(name).__file__).read_text()
        for call in re.findall(r"tl\.dot\((?:[^()]|\([^()]*\)|\((?:[^()]|\([^()]*\))*\))*\)", source):
            assert 'input_precision="ieee"' in call or "input_precision=PRECISION" in call, f"{name}: {call}"
    attention = Path(importlib.import_module("maefast.kernels.attention").__file__).read_text()
    assert set(re.findall(r"\"?PRECISION\"?[=:] *(.+?),\n", attention)) == {
        '"ieee" if q.dtype is torch.float32 else "tf32"'
    }


def test_nothing_is_tuned_at_a_call():
    """Autotuning runs and waits: it may not happen inside a capture, so tiles are chosen by shape."""
    for name in MODULES:
        assert "autotune" not in Path(importlib.import_module(name).__file__).read_text(), name


def test_every_cuda_status_is_looked_at():
    """No call of the CUDA runtime whose answer is dropped; a launch is followed by check_launch."""
    looked_at = re.compile(r"check\(\s*$|=\s*$")
    for path in sorted(CUDA.glob("*.cu*")):
        code = re.sub(r"//.*", "", path.read_text())
        for call in re.finditer(r"\bcuda[A-Z]\w*\(", code):
            name, before = call.group()[:-1], code[: call.start()].rstrip(" ")
            if name == "cudaGetLastError" and path.name == "common.cuh":
                continue  # it is the check
            if name == "cudaGetErrorString":
                continue
            assert looked_at.search(before), f"{path.name}: {name}"
        for launch in re.finditer(r"<<<", code):
            assert "check_launch" in code[launch.end() : launch.end() + 2500], path.name


def test_the_mirrors_are_whole():
    """Each kernel family is among the recorded ones, so that a new one cannot be forgotten here."""
    families = {name.removesuffix("_cases") for name in (cases.__name__ for cases in CASES)}
    own = {m.rsplit(".", 1)[1] for m in MODULES if hasattr(importlib.import_module(m), "OPS")}
    assert own <= families, own - families
    assert torch.device("meta") == meta(1).device
