"""Which backend serves an op: `cuda` -> `triton` -> `cpu` -> `reference`, or the one that was asked for.

The automatic choice takes a CUDA C++ kernel only once its tests passed on a real device (`CUDA_EVIDENCE`) and it was
faster there than the Triton kernel. A backend that was asked for by name, by `maefast.backend(...)` or by
MAEFAST_BACKEND is used or raises: it never falls back in silence.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager

import torch

from maefast import _native
from maefast.ops import _dispatch_data, _registry
from maefast.ops._dispatch_data import Evidence

BACKENDS = ("cuda", "triton", "cpu", "reference")

# op -> evidence that its CUDA C++ kernel passed its tests on a real device, from `dispatch_data.json`.
CUDA_EVIDENCE: dict[str, Evidence] = _dispatch_data.DATA.cuda
# op -> evidence for the Triton kernel on a real device; without it the doctor says UNTESTED.
TRITON_EVIDENCE: dict[str, Evidence] = _dispatch_data.DATA.triton

UNTESTED = "never tested on a GPU, only in Triton's interpreter on a CPU"

# Public op -> the raw op whose presence decides. `attention` has a table of its own: `_attention_table`.
PUBLIC_OPS = {
    "token_mask": "token_mask",
    "patch_embed": "patch_rows",
    "gather_tokens": "gather_tokens",
    "restore_tokens": "restore_tokens",
    "add_norm": "add_norm",
    "bias_gelu": "bias_gelu",
    "patch_loss": "patch_loss",
    "adamw": "adamw",
    "batch_norm_act": "norm_act",
    "grn": "norm_act",
    "group_norm_cells": "norm_act",
    "segment_sum": "segment_stats",
    "pack_cells": "pack_cells",
    "unpack_cells": "unpack_cells",
    "max_pool_cells": "max_pool_cells",
    "avg_pool_cells": "avg_pool_cells",
    "depthwise_cells": "depthwise",
    "farthest_points": "farthest_points",
    "knn": "knn",
    "chamfer": "chamfer",
    "resize": "resize",
    "feature_loss": "feature_loss",
}

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CPU_OPS: frozenset[str] = frozenset()  # the raw ops that C++ serves, known after `load_kernels`
CUDA_OPS: frozenset[str] = frozenset()

_forced: str | None = None


def load_kernels() -> None:
    """Load the native libraries and see which raw ops they serve: once, when all families are defined."""
    global CPU_OPS, CUDA_OPS
    _native.load()
    if _native.has_cpu_ops:
        CPU_OPS = frozenset(op for op in _registry.SCHEMAS if _registry.has_kernel(op, "CPU"))
    if _native.has_cuda_ops:
        CUDA_OPS = frozenset(op for op in _registry.SCHEMAS if _registry.has_kernel(op, "CUDA"))


def check_name(name: str | None, source: str) -> str | None:
    """`name`, None for the automatic choice; raises ValueError for an unknown one."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"{source}: the name of a backend must be a str or None, got {type(name).__name__}")
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose from {', '.join(BACKENDS)} or 'auto'")
    return name


_forced = check_name(os.environ.get("MAEFAST_BACKEND"), "MAEFAST_BACKEND")


def forced() -> str | None:
    """The backend that `maefast.backend` or MAEFAST_BACKEND forces now, or None."""
    return _forced


@contextmanager
def backend(name: str | None):
    """Force one backend for every maefast op inside the `with` block (process-wide, not per thread).

    Args:
        name: "cuda", "triton", "cpu", "reference", or "auto"/None for the automatic choice.

    Raises:
        ValueError: unknown name. An op that the backend cannot serve raises RuntimeError where it is called.
    """
    global _forced
    before, _forced = _forced, check_name(name, "maefast.backend")
    try:
        yield
    finally:
        _forced = before


def unavailable(op: str, name: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why backend `name` cannot serve raw op `op` on such tensors, or None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return f"the C++ kernels take CPU tensors, not {device_type} ones"
        return None if op in CPU_OPS else _native.status()["error"] or "the C++ library lacks this op"
    if name == "cuda":
        if device_type != "cuda":
            return f"CUDA kernels take CUDA tensors, not {device_type} ones"
        if op in CUDA_OPS:
            return "CUDA kernels do not serve float64" if dtype is torch.float64 else None
        return _native.status()["cuda_note"] or "this op has no CUDA C++ kernel"
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if dtype is torch.float64:
        return "the Triton kernels do not serve float64"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRET):
        return None
    return f"Triton takes CUDA tensors, not {device_type} ones (or set TRITON_INTERPRET=1 to interpret on a CPU)"


def choose(
    op: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    asked: str | None = None,
    fits_triton: bool = True,
    solid: bool = False,
) -> str:
    """The backend for raw op `op`; `asked` is the caller's own `backend=` argument, `fits_triton` whether the Triton
    kernel takes an input of this size, `solid` whether maps have depth, which the GPU kernels of cells do not know."""
    name = check_name(asked, "backend") or _forced
    if name is not None:
        reason = unavailable(op, name, device_type, dtype)
        if solid and name in ("cuda", "triton"):
            reason = "its kernel takes maps of two sides, not of three"
        if name == "triton" and not fits_triton:
            reason = reason or "the input is too large for the Triton kernel"
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for, but {op} cannot use it: {reason}")
        return name
    if device_type == "cpu":
        return "cpu" if op in CPU_OPS else "reference"
    if device_type == "cuda" and not solid and dtype is not torch.float64:
        if op in CUDA_OPS and _cuda_pays(op):
            return "cuda"
        if HAS_TRITON and fits_triton:
            return "triton"
    return "reference"


def _cuda_pays(op: str) -> bool:
    """Whether the CUDA C++ kernel was tested on a device and measured to be faster than the Triton kernel there."""
    evidence = CUDA_EVIDENCE.get(op)
    return evidence is not None and evidence.faster is not None and evidence.faster > 1


def why(public_op: str, device_type: str) -> tuple[str, str]:
    """(backend, reason) of the present choice for a public op on "cpu" or "cuda", for `maefast doctor`."""
    op = PUBLIC_OPS[public_op]
    if _forced is not None:
        reason = unavailable(op, _forced, device_type)
        return _forced, f"forced; {'cannot serve: ' + reason if reason else 'available'}"
    name = choose(op, device_type)
    if name == "cpu":
        return name, "C++ kernel"
    if name == "cuda":
        return name, f"CUDA C++ kernel, {CUDA_EVIDENCE[op]}"
    if name == "triton":
        tested = TRITON_EVIDENCE.get(op, UNTESTED)
        return name, f"Triton kernel, {tested}; float64 goes to the reference"
    if device_type == "cpu":
        return name, f"plain PyTorch: {unavailable(op, 'cpu', device_type)}"
    return name, f"plain PyTorch: {unavailable(op, 'triton', device_type)}"


def untested() -> list[str]:
    """Public ops whose automatic choice on "cuda" is, always or at times, a Triton kernel that no GPU has run yet."""
    if _forced is not None:
        return []  # whoever forces one knows
    ops = {**PUBLIC_OPS, "attention": "attention"}
    return [op for op, raw in ops.items() if choose(raw, "cuda") == "triton" and raw not in TRITON_EVIDENCE]
