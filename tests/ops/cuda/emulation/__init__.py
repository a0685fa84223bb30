"""The device code of CUDA C++ attention, compiled for a CPU: what its tests can show without a GPU.

`simt.h` runs the threads of a block as fibers, `cuda/attention_mma.cuh` stands in for the few functions written in PTX;
all else is the very source that nvcc compiles. It shows that indices, masks, sums and barriers are right, not that the
PTX is, nor how fast it is.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[3] / "csrc"
PLACES = ("q", "k", "v", "grad", "out", "dq", "dk", "dv", "lse", "cu_q", "cu_k")


class _Args(ctypes.Structure):
    """Args of csrc/cuda/attention_kernel.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in PLACES),
        *((name, ctypes.c_int64) for name in ("q_stride", "kv_stride")),
        *((name, ctypes.c_int) for name in ("heads", "width", "max_q", "max_k")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        ("o", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    ]


class _Run(ctypes.Structure):
    """Run of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "limit")),
        ("order", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("late", "backward")),
        *((name, ctypes.c_int) for name in ("threads", "rounds")),
        ("bytes", ctypes.c_int64),
    ]


def unavailable() -> str | None:
    """Why it cannot be built here, or None."""
    if os.name != "posix" or _compiler() is None:
        return "no C++ compiler"
    if not SOURCES.is_dir():
        return "needs the source tree"
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "attention.so"
        include = Path(torch.__file__).parent / "include"
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
        places = ["-I", HERE, "-I", SOURCES, "-isystem", include]
        subprocess.run([_compiler(), *options, *places, HERE / "attention.cpp", "-o", library], check=True)
        return ctypes.CDLL(str(library))


class Emulated:
    """`forward` and `backward` with the raw ops' arguments, on CPU tensors.

    limit: bytes of shared memory that a block may have (227 KiB on an H100, 163 on an A100, 99 on sm_86 and sm_89).
    order: 0 runs warps and lanes in order, 1 backwards, above that shuffled. late: copies into shared memory land when
    they are waited for, otherwise at once.
    """

    def __init__(self, limit: int = 227 * 1024, order: int = 0, late: bool = True):
        self.limit, self.order, self.late = limit, order, late
        self.threads = self.bytes = self.rounds = 0  # of the last launch

    def _call(self, q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, backward, **places: Tensor) -> None:
        assert q.is_contiguous()
        assert kv is None or kv.is_contiguous()
        heads, width = q.shape[-2:]
        part, size = heads * width, q.element_size()
        key = q.data_ptr() + part * size if kv is None else kv.data_ptr()
        dq = places.pop("grad_q", None)
        dkv = places.pop("grad_kv", None)
        at = {name: t.data_ptr() for name, t in places.items()}
        at |= {"q": q.data_ptr(), "k": key, "v": key + part * size}
        if dq is not None:
            dk = dq.data_ptr() + part * size if kv is None else dkv.data_ptr()
            at |= {"dq": dq.data_ptr(), "dk": dk, "dv": dk + part * size}
        at["cu_q"] = None if cu_q is None else cu_q.data_ptr()
        at["cu_k"] = at["cu_q"] if kv is None else None if cu_k is None else cu_k.data_ptr()
        strides = (3 * part, 3 * part) if kv is None else (part, 2 * part)
        args = _Args(**at, heads=heads, width=width, max_q=max_q, max_k=max_k, scale=scale, causal=causal)
        args.q_stride, args.kv_stride = strides
        run = _Run(batch=batch, limit=self.limit, order=self.order, late=self.late, backward=backward)
        bfloat = ctypes.c_bool(q.dtype is torch.bfloat16)
        _library().run_attention(ctypes.byref(args), ctypes.byref(run), bfloat)
        self.threads, self.bytes, self.rounds = run.threads, run.bytes, run.rounds

    def forward(self, q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, key_bias, marked, stats):
        assert key_bias is None
        assert marked is None
        assert not stats
        out = torch.full((q.shape[0], *q.shape[-2:]), float("nan"), dtype=q.dtype)
        lse = torch.full((q.shape[0], q.shape[-2]), float("nan"))
        sizes = (batch, max_q, max_k, scale, causal)
        if q.shape[0] > 0:
            self._call(q, kv, cu_q, cu_k, *sizes, False, out=out, lse=lse)
        return out, lse, torch.empty(0), torch.empty(0)

    def backward(self, grad, g_lse, g_entropy, g_mass, q, kv, out, lse, entropy, mass, cu_q, cu_k, *rest):
        grad_q = torch.full_like(q, float("nan"))
        grad_kv = torch.empty(0, dtype=q.dtype) if kv is None else torch.full_like(kv, float("nan"))
        places = {"grad": grad, "o": out, "lse": lse, "grad_q": grad_q, "grad_kv": grad_kv}
        if q.shape[0] > 0 or (kv is not None and kv.shape[0] > 0):
            self._call(q, kv, cu_q, cu_k, *rest[:5], True, **places)
        return grad_q, grad_kv, torch.empty(0)
