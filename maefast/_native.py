"""Loads the native libraries: `maefast._C` (no torch), `_cpu.so` and `_cuda.so` (LibTorch stable ABI).

`load()` is called once, when `maefast.ops` has defined the op schemas. Nothing here raises:
what cannot be loaded is recorded in `status()` and reported by one `NativeWarning`, and the reference (and
Triton) serve instead. Only MAEFAST_REQUIRE_NATIVE=1 turns that warning into an ImportError.

Environment: MAEFAST_DISABLE_NATIVE=1 loads nothing (no warning: it was asked for); MAEFAST_NATIVE_DIR names
another directory with the libraries; MAEFAST_CPU_ISA (plain, avx2, avx512, avx512bf16, amx) lowers the CPU instruction
set; MAEFAST_HUGE_PAGES=on or off has large results of CPU kernels on huge pages, or on pages of the usual size (without
it: on huge pages, unless this is a virtual machine that gives free pages back to its host).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ISAS = ("plain", "avx2", "avx512", "avx512bf16", "amx")

has_cpu_ops = False
has_cuda_ops = False
C: ModuleType | None = None

_status: dict[str, Any] = {"C": False, "cpu": False, "cuda": False, "error": None, "cuda_note": None, "paths": {}}
_loaded = False


class NativeWarning(UserWarning):
    """The native libraries are missing or do not load; maefast works, but slower."""


def status() -> dict[str, Any]:
    """What is loaded: {"C", "cpu", "cuda": bool, "error", "cuda_note": str | None, "paths": {name: path}}."""
    return {**_status, "paths": dict(_status["paths"])}


def why_missing(name: str) -> str:
    """Why an op has no kernel in the library `name` ("cpu" or "cuda"), in a few words."""
    if _status[name]:
        return f"this op has no kernel in _{name}.so"
    reason = _status["cuda_note"] if name == "cuda" else _status["error"]
    return reason or f"_{name}.so is not loaded"


def load() -> None:
    """Load what can be loaded. The schemas of the namespace `maefast` must be defined. Idempotent."""
    global _loaded, has_cpu_ops, has_cuda_ops, C
    if _loaded:
        return
    _loaded = True
    if os.environ.get("MAEFAST_DISABLE_NATIVE") == "1":
        _status["error"] = _status["cuda_note"] = "switched off by MAEFAST_DISABLE_NATIVE=1"
        return
    problems = []
    try:
        C = importlib.import_module("._C", __package__)
        _status["C"] = True
    except ImportError as error:
        problems.append(f"maefast._C: {_first_line(error)}")
    if error := _load_library("cpu"):
        problems.append(error)
    has_cpu_ops = _status["cpu"]

    if torch.version.cuda is None:
        _status["cuda_note"] = "this torch has no CUDA"
    elif find_library("cuda") is None:
        _status["cuda_note"] = "built without the CUDA ops" + _because("cuda_choice")
    elif error := _load_library("cuda"):
        problems.append(error)
        _status["cuda_note"] = error
    has_cuda_ops = _status["cuda"]

    isa = os.environ.get("MAEFAST_CPU_ISA")
    if isa is not None and isa not in ISAS:
        warnings.warn(f"MAEFAST_CPU_ISA={isa!r} is not one of {', '.join(ISAS)}; ignored", stacklevel=2)
    if problems:
        _status["error"] = "; ".join(problems)
        _report(_status["error"])


def find_library(name: str) -> Path | None:
    """Path of the library `_<name>.so`, or None. An editable install has it outside the source tree."""
    for directory in _directories():
        path = Path(directory, f"_{name}.so")
        if path.exists():
            return path
    return None


def _because(choice: str) -> str:
    """ ": reason" as the build recorded it, or "" where it did not."""
    reason = C.build_info().get(choice) if C is not None else None
    return f": {reason}" if reason else ""


def build_failure() -> str | None:
    """Why the installation went without native libraries, if it did."""
    try:
        note = Path(str(importlib.metadata.distribution("maefast").locate_file("maefast/_build_failure.txt")))
        return note.read_text().strip()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _directories() -> list[str]:
    if directory := os.environ.get("MAEFAST_NATIVE_DIR"):
        return [directory]
    return list(importlib.import_module(__package__).__path__)


def _load_library(name: str) -> str | None:
    """Load one library; returns what went wrong, or None."""
    path = find_library(name)
    if path is None:
        return f"_{name}.so is not installed"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"_{name}.so: {_first_line(error)}"
    _status[name] = True
    _status["paths"][name] = str(path)
    return None


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error  # torch wraps what the loader said
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _report(error: str) -> None:
    built = C.build_info()["torch"] if C is not None else None
    if note := build_failure():
        cause, cure = note, "install a C++17 compiler and reinstall maefast"
    elif "undefined symbol" in error and built != torch.__version__:
        cause = f"the libraries were built with torch {built}, and this is torch {torch.__version__}"
        cure = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps` of maefast"
    else:
        cause, cure = error, "reinstall maefast (`pip install -v` shows the build)"
    message = (
        "maefast runs without (some of) its native kernels: masking, gathering, restoring and the patch loss use "
        f"plain PyTorch instead, which is slower on CPUs but gives the same results. Cause: {cause}. "
        f"To mend: {cure}. `maefast doctor` tells more."
    ) + (f" [{error}]" if error != cause else "")
    if os.environ.get("MAEFAST_REQUIRE_NATIVE") == "1":
        raise ImportError(message)
    warnings.warn(message, NativeWarning, stacklevel=3)
