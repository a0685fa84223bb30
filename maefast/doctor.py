"""`maefast doctor`: what is installed, what the machine has, and which backend serves each op, and why.

`collect()` gathers plain data (JSON-ready), `render()` prints it as tables. Meant to be pasted into a bug
report: it names versions and hardware, and no path outside the installed package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import maefast
from maefast import _native

Info = dict[str, Any]


def collect() -> Info:
    """Everything the doctor knows.

    Returns:
        dict with "versions" {name: str | None}, "cpu", "gpus" [..], "build" (what the native libraries were built
        with), "native" (`maefast._native.status()` without paths), "environment" {variable: value},
        "ops" [{"op", "device", "backend", "reason"}], "evidence" (GPU kernels that passed their tests on a device:
        [{"kernel", "op", "device", "commit", "date", "faster"}]) and "warnings" [str].
    """
    info: Info = {
        "versions": _versions(),
        "cpu": cpu(),
        "gpus": _gpus(),
        "build": dict(_native.C.build_info()) if _native.C is not None else {},
        "native": {key: value for key, value in _native.status().items() if key != "paths"},
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name.startswith("MAEFAST_") or name in ("OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
        },
    }
    info["ops"] = _ops(bool(info["gpus"]))
    info["evidence"] = _evidence()
    info["warnings"] = _warnings(info)
    return info


def render(info: Info, console: Any = None) -> None:
    """Print `collect()`'s result as tables on a `rich.console.Console` (default: standard output)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()

    def table(title: str, *columns: str) -> Table:
        result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=len(columns) > 2)
        for column in columns:
            result.add_column(column, overflow="fold")
        return result

    versions = table("Versions", "", "")
    for name, version in info["versions"].items():
        versions.add_row(name, version or "not there")
    console.print(versions)

    devices = table("Devices", "", "")
    cpu = info["cpu"]
    devices.add_row("CPU", f"{cpu['name']}, {cpu['usable']} of {cpu['threads']} threads usable")
    devices.add_row("CPU features", " ".join(name for name, there in cpu["features"].items() if there) or "unknown")
    devices.add_row("CPU kernels use", f"{cpu['isa']} (best here: {cpu['best_isa']}), {cpu['torch_threads']} threads")
    for index, gpu in enumerate(info["gpus"]):
        devices.add_row(f"GPU {index}", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    if not info["gpus"]:
        devices.add_row("GPU", "none that torch sees")
    console.print(devices)

    native = table("Native libraries", "", "")
    status, build = info["native"], info["build"]
    for key, label in (("C", "_C (what was built)"), ("cpu", "_cpu (CPU ops)"), ("cuda", "_cuda (CUDA ops)")):
        note = status["cuda_note"] if key == "cuda" else status["error"]
        native.add_row(label, "loaded" if status[key] else f"not loaded: {note or 'not asked for'}")
    for key, value in build.items():
        if value:
            native.add_row(f"built: {key}", value)
    console.print(native)

    ops = table("Which backend serves each op, and why", "op", "tensors on", "backend", "why")
    for row in info["ops"]:
        ops.add_row(row["op"], row["device"], row["backend"], row["reason"])
    console.print(ops)

    evidence = table("GPU kernels that passed their tests on a device", "kernel", "op", "device", "commit", "date")
    for row in info["evidence"]:
        evidence.add_row(*(row[key] for key in ("kernel", "op", "device", "commit", "date")))
    if info["evidence"]:
        console.print(evidence)
    else:
        console.print("GPU kernels that passed their tests on a device: none yet.", highlight=False)

    for name, value in info["environment"].items():
        console.print(f"environment: {name}={value}", highlight=False, markup=False)
    for warning in info["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    if not info["warnings"]:
        console.print("No warnings.", style="green")


def report(as_json: bool = False) -> None:
    """What the command does: collect, then print tables, or JSON with `as_json`."""
    info = collect()
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        render(info)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"maefast": maefast.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    for name in ("triton", "numpy", "safetensors", "accelerate", "transformers"):
        versions[name] = _version(name)
    versions["CUDA of torch"] = torch.version.cuda
    versions["NVIDIA driver"] = _driver()
    versions["system"] = f"{platform.system()} {platform.machine()}, glibc {platform.libc_ver()[1] or 'unknown'}"
    return versions


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(name) else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n")[0].strip() or None


def _driver_cuda() -> int | None:
    """Newest CUDA major version that the driver supports."""
    try:
        return torch._C._cuda_getDriverVersion() // 1000
    except (AttributeError, RuntimeError):
        return None


def cpu() -> Info:
    """The processor: name, threads, those that may be used and those that torch uses, features, instruction sets."""
    native = _native.C
    usable = native.usable_cpus() if native else len(os.sched_getaffinity(0))
    if quota := _cpu_quota():
        usable = min(usable, quota)
    return {
        "name": _cpu_name(),
        "threads": os.cpu_count(),
        "usable": usable,
        "torch_threads": torch.get_num_threads(),
        "features": dict(native.cpu_features()) if native else {},
        "isa": native.current_isa() if _native.has_cpu_ops and native else "no native kernels",
        "best_isa": native.supported_isa() if native else "unknown",
        "machine_isa": native.machine_isa() if native else "unknown",
    }


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def _cpu_quota() -> int | None:
    """CPUs that the container's cgroup (v2) grants, rounded up; None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return None


def _gpus() -> list[Info]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "multiprocessors": gpu.multi_processor_count,
            }
        )
    return gpus


def _ops(has_gpu: bool) -> list[Info]:
    from maefast.ops import _attention_table, _conv_table, _dispatch, linear_library

    rows = []
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        for op in _dispatch.PUBLIC_OPS:
            backend, reason = _dispatch.why(op, device)
            rows.append({"op": op, "device": device, "backend": backend, "reason": reason})
        for backend, reason in _attention_table.why(device):
            rows.append({"op": "attention", "device": device, "backend": backend, "reason": reason})
        for route, reason in _conv_table.why(device):
            rows.append({"op": "conv_cells", "device": device, "backend": route, "reason": reason})
    library, reason = linear_library()
    rows.append({"op": "linear", "device": "cpu", "backend": library, "reason": f"float32: {reason}"})
    return rows


def _evidence() -> list[Info]:
    from maefast.ops import _dispatch

    kinds = (("CUDA C++", _dispatch.CUDA_EVIDENCE), ("Triton", _dispatch.TRITON_EVIDENCE))
    return [{"kernel": name, "op": op, **found._asdict()} for name, known in kinds for op, found in known.items()]


def _warnings(info: Info) -> list[str]:
    from maefast.ops import _dispatch

    found = []
    native, cpu, build = info["native"], info["cpu"], info["build"]
    if native["error"]:
        found.append(f"the native libraries are not all loaded: {native['error']}")
    if failure := _native.build_failure():
        found.append(f"installed without native libraries: {failure}")
    if torch.version.cuda and not info["gpus"]:
        found.append("this torch has CUDA, but no GPU is visible (driver? CUDA_VISIBLE_DEVICES?)")
    if info["versions"]["NVIDIA driver"] and not torch.version.cuda:
        found.append("there is an NVIDIA driver, but this torch is CPU-only: install a CUDA build of torch")
    if info["gpus"] and info["versions"]["triton"] is None:
        found.append("there is a GPU, but Triton is not installed: `pip install triton`")
    if info["gpus"] and native["cuda"]:
        for gpu in info["gpus"]:
            if not _serves(build.get("cuda_archs", ""), int(gpu["capability"])):
                found.append(f"_cuda.so has no code for {gpu['name']} (sm_{gpu['capability']}): set MAEFAST_CUDA_ARCHS")
    if info["gpus"] and (untested := _dispatch.untested()):
        found.append(
            f"on this GPU {len(untested)} ops are served by Triton kernels that were never tested on one "
            f"({', '.join(untested)}): run the tests first (`pytest -m gpu`), or set MAEFAST_BACKEND=reference"
        )
    supported = _driver_cuda() if info["gpus"] and native["cuda"] else None
    if supported is not None and build.get("cuda") and int(build["cuda"].split(".")[0]) > supported:
        found.append(
            f"_cuda.so was compiled with CUDA {build['cuda']}, and the driver supports CUDA {supported}: "
            "update the driver, or rebuild with an nvcc of that version"
        )
    if cpu["torch_threads"] > cpu["usable"]:
        found.append(
            f"torch runs {cpu['torch_threads']} threads on {cpu['usable']} usable CPUs; they take turns: "
            f"set OMP_NUM_THREADS={cpu['usable']}"
        )
    if info["cpu"]["isa"] != info["cpu"]["best_isa"] and _native.has_cpu_ops:
        found.append(f"the CPU kernels use {cpu['isa']} though {cpu['best_isa']} is there (MAEFAST_CPU_ISA)")
    if cpu["machine_isa"] != cpu["best_isa"] and _native.has_cpu_ops:
        found.append(
            f"this CPU has {cpu['machine_isa']}, and the CPU kernels were built for {build['cpu_isas']}: "
            "install maefast on this machine, or with MAEFAST_ISAS=all"
        )
    if cpu["features"].get("avx512bf16") is False:
        found.append("this CPU has no bfloat16 instructions: autocast to bfloat16 is slower on it than float32")
    return found


def _serves(archs: str, capability: int) -> bool:
    """Whether code for `archs` ("80-real 90a-real 100-virtual") runs on a device of that capability."""
    for arch in archs.split():
        number, _, kind = arch.partition("-")
        digits = int(re.sub(r"\D", "", number) or 0)
        if kind != "virtual":
            exact = number.endswith("a")
            same_family = digits // 10 == capability // 10 and digits <= capability
            if digits == capability or (same_family and not exact):
                return True
        if kind != "real" and not number.endswith("a") and digits <= capability:
            return True
    return False


if __name__ == "__main__":
    report(as_json="--json" in sys.argv[1:])
