"""The registry of maefast's raw ops: one schema and one fake for each, shared by every compiled backend.

A family (a file of ``maefast.ops``) defines its raw ops above the autograd that calls them::

    _raw_op = _registry.family("gelu")

    @_raw_op("bias_gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor")
    def _bias_gelu_fake(x, bias, tanh):
        return x.new_empty(x.shape)  # shapes and dtypes only

Each schema is defined in two `torch.library` namespaces:

- ``maefast``: implemented in C++ for the keys CPU (``csrc/cpu``) and CUDA (``csrc/cuda``);
- ``maefast_triton``: implemented in Python by ``maefast.kernels.<family>`` for CUDA, and for CPU tensors under
  the Triton interpreter.

Raw ops are private: they trust their input. The public functions in ``maefast.ops`` check it, choose a backend
and wrap the raw op in an ``autograd.Function`` (outside the op, which costs a third of a registered autograd).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

FAMILIES: dict[str, dict[str, str]] = {}  # family -> {op: schema}
SCHEMAS: dict[str, str] = {}  # op -> schema
FAMILY_OF: dict[str, str] = {}  # op -> family
CPU_ONLY: set[str] = set()  # families without Triton kernels
TRITON_ONLY: set[str] = set()  # families without C++ kernels

NAMESPACE = "maefast"  # that of csrc/*/registration.cpp
_cpp = torch.library.Library(NAMESPACE, "DEF")
_triton = torch.library.Library(f"{NAMESPACE}_triton", "DEF")
_CPP_OPS: dict[str, torch._ops.OpOverload] = {}
_TRITON_OPS: dict[str, torch._ops.OpOverload] = {}


def family(name: str, *, cpp: bool = True, triton: bool = True) -> Callable[[str], Callable]:
    """A family of raw ops: the decorator that defines one, given its schema, above its fake.

    Args:
        name: names the family's file in every layer: ops/, csrc/cpu/, kernels/, csrc/cuda/.
        cpp, triton: False where the family has no such kernels by choice.
    """
    ops = FAMILIES[name] = {}
    if not cpp:
        TRITON_ONLY.add(name)
    if not triton:
        CPU_ONLY.add(name)

    def raw_op(schema: str) -> Callable:
        op = schema.partition("(")[0]

        def define(fake: Callable) -> Callable:
            for lib in (_cpp, _triton):
                lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides))
                torch.library.register_fake(f"{lib.ns}::{op}", fake, lib=lib)
            for key in ("CPU", "CUDA") if triton else ():
                _triton.impl(op, _triton_impl(name, op), key)
            ops[op] = SCHEMAS[op] = schema
            FAMILY_OF[op] = name
            _CPP_OPS[op] = getattr(getattr(torch.ops, _cpp.ns), op).default
            _TRITON_OPS[op] = getattr(getattr(torch.ops, _triton.ns), op).default
            return fake

        return define

    return raw_op


def _triton_impl(family: str, op: str) -> Callable:
    """An implementation that imports its kernels at the first call, so that maefast imports without Triton."""
    kernel = None

    def call(*args):
        nonlocal kernel
        if kernel is None:
            kernel = importlib.import_module(f"..kernels.{family}", __package__).OPS[op]
        return kernel(*args)

    return call


def raw(op: str, backend: str):
    """The raw op that serves `op` on `backend` ("cpu", "cuda" or "triton")."""
    return _TRITON_OPS[op] if backend == "triton" else _CPP_OPS[op]


def has_kernel(op: str, key: str) -> bool:
    """Whether C++ registered an implementation of `op` for the dispatch key "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


__all__ = ["CPU_ONLY", "FAMILIES", "FAMILY_OF", "SCHEMAS", "TRITON_ONLY", "family", "has_kernel", "raw"]
