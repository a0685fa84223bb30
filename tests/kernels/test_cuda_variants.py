"""CUDA C++ kernels by their mangled names, and where their machine code comes from.

That the launches are those of csrc/cuda: tests/ops/cuda/test_attention_emulated.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from maefast import _native
from tests.kernels import cuda_variants, resources
from tests.kernels.cuda_variants import ARCHITECTURES, Launch, describe
from tests.kernels.resources import Code, Resources

SHORT = "_ZN7maefast4cuda20attention_bwd_kernelI6__halfLi64EEEvNS0_4ArgsE"
TILED = "_ZN7maefast4cuda26attention_tiled_fwd_kernelI13__nv_bfloat16Li32EEEvNS0_4ArgsEi"
GATHER = "_ZN7maefast4cuda40_GLOBAL__N__c08198f8_8_embed_cu_caa1bb7a13gather_kernelI5uint4EEvNS1_4RowsE"


@pytest.mark.parametrize(
    ("function", "kernel", "case", "warps"),
    [
        (SHORT, "attention_bwd_kernel", "f16 S=50 D=64", 4),
        (TILED, "attention_tiled_fwd_kernel", "bf16 S=197 D=32", 7),
        (
            SHORT.replace("20attention_bwd", "26attention_tiled_bwd").replace("Li64E", "Li64ELi2E"),
            None,
            "f16 S=197 D=64",
            8,
        ),
        (
            SHORT.replace("20attention_bwd", "26attention_tiled_bwd").replace("Li64E", "Li64ELi1E"),
            None,
            "f16 S=256 D=64",
            9,
        ),
        (GATHER, "gather_kernel", "rows in words of 16 B", 8),
        (GATHER.replace("5uint4", "h"), "gather_kernel", "rows in words of 1 B", 8),
    ],
)
def test_names(function, kernel, case, warps):
    _, found, text, launch = describe(function, 80)
    assert (found, text, launch.threads) == (kernel or "attention_tiled_bwd_kernel", case, 32 * warps)


def test_other_functions_are_none_of_ours():
    assert describe("_ZN3cub11EmptyKernelIvEEvv", 80) is None


def test_shared_memory_by_hand():
    # Four tiles of 64 rows of 64 + 8 halves, and P and dS of 64 rows of 64 + 8.
    assert describe(SHORT, 80)[3] == Launch(128, 2 * (4 * 64 * 72 + 2 * 64 * 72))
    assert describe(GATHER, 80)[3] == Launch(256, 0)


@pytest.fixture
def library(monkeypatch):
    """A library that was built for all architectures."""
    monkeypatch.setattr(_native, "find_library", lambda name: Path("_cuda.so"))
    monkeypatch.setattr(resources, "tools", lambda: "tools")
    monkeypatch.setattr(resources, "architectures", lambda path: set(ARCHITECTURES.values()))
    codes = {name: Code(Resources(64, 0, 0), b"code") for name in (SHORT, GATHER, "_ZN3cub11EmptyKernelIvEEvv")}
    monkeypatch.setattr(resources, "extract", lambda path, architecture: codes)
    monkeypatch.setattr(cuda_variants, "compile_only", lambda *_: pytest.fail("nothing to compile"))


def test_from_the_library(library):
    found = cuda_variants.variants(90)
    assert [(v.language, v.kernel, v.launch, v.target) for v in found] == [
        ("cuda", "attention_bwd_kernel", 0, 90),
        ("cuda", "gather_kernel", 1, 90),
    ]
    assert found[0].shared == 55296
    assert found[0].occupancy.blocks == 4


def test_a_library_that_lacks_an_architecture(library, monkeypatch):
    monkeypatch.setattr(resources, "architectures", lambda path: {"sm_90a"})
    assert cuda_variants.variants(90, compiles=False) == []
    monkeypatch.setattr(cuda_variants, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_variants, "compile_only", lambda *_: {GATHER: Code(Resources(40, 0, 0), b"code")})
    assert [v.kernel for v in cuda_variants.variants(90)] == ["gather_kernel"]
    monkeypatch.setattr(cuda_variants, "nvcc", lambda: None)
    assert cuda_variants.variants(90) == []
    assert cuda_variants.compiler() is None
