"""What a figure must name: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
# The checkout that this file is in (bench/, or maefast/bench/ in the tree of gpu_check.sh); an installed one has none.
CHECKOUT = next((path for path in HERE.parents[:2] if (path / "pyproject.toml").is_file()), None)
ROOT = CHECKOUT or HERE.parents[1]
# A change outside these cannot move a figure.
CODE = ("maefast", "csrc", "kernels", "bench", "CMakeLists.txt", "pyproject.toml", ":!bench/results")


def describe(device: str) -> dict[str, Any]:
    """The environment of a run on `device` ("cpu" or "cuda"), as plain JSON."""
    import maefast
    from maefast import _native

    commit, dirty = _commit()
    info = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "kind": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "maefast": maefast.__version__,
        "commit": commit,
        "dirty": dirty,
        "isa": _native.C.current_isa() if _native.C is not None else None,
        "native": {name: bool(_native.status()[name]) for name in ("C", "cpu", "cuda")},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["cuda"] = torch.version.cuda
        info["capability"] = f"{properties.major}.{properties.minor}"
        info["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return info


def exact_float32() -> None:
    """No TF32: by default torch lets cuDNN's convolutions use it but not matrix products, which would compare a
    convolution in 10 bits with a product in 23."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Virtual machines often hide the model's number; family and model still tell which core it is.
    if family := fields.get("cpu family"):
        name += f" (family {family}, model {fields.get('model', '?')})"
    return f"{name}, {cores} cores"


def slug(device: str) -> str:
    """A device's name as that of a folder: "amd-epyc-family-25-model-1-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def cache_bytes(device: str) -> int:
    """Size of the last cache in front of memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes) or 32 * 2**20


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether the code differs from it). A tree without .git, or a copy of one, is told by MAEFAST_COMMIT
    and MAEFAST_DIRTY (0 or 1)."""
    if commit := os.environ.get("MAEFAST_COMMIT"):
        return commit, {"0": False, "1": True}.get(os.environ.get("MAEFAST_DIRTY", ""))
    if CHECKOUT is None:  # what the installed library was built from
        from maefast import _native

        return (_native.C.build_info().get("commit") or None) if _native.C is not None else None, None
    commit = output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(output("git", "status", "--porcelain", "--", *CODE))


def output(*command: str) -> str | None:
    """What a command prints, or None where it cannot run or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
