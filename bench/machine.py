"""What this machine can do, measured at the start of a run: the limits that figures are held against.

`measure` times a large copy and square matrix products in each dtype, each by its fastest means here; `condition` reads
what the system tells of load, clocks and temperature. No op can be faster than its bytes over the copy's rate or its
FLOPs over the product's (the roofline of Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from maefast.bench import environment, timing
from maefast.ops import linear
from maefast.profiling.machine import load

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
UNKNOWN: dict[str, Any] = {"condition": {}, "copy_gb_s": None, "matrix_tflops": {}}  # for runs that judge no speed
BUSY = 0.5  # cores that others use, above which times do not mean much


def measure(device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> dict[str, Any]:
    """{"copy_gb_s": read plus written, "matrix_tflops": {dtype name: 2 n^3 over seconds}, "condition": ...}."""
    return {
        "condition": condition(device),
        "copy_gb_s": timing.copy_bandwidth(device) / 1e9,
        "matrix_tflops": {str(dtype)[6:]: matrix_rate(device, dtype) / 1e12 for dtype in dtypes},
    }


def matrix_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOPs a second of a square product in the dtype, by torch's library or the one that `ops.linear` chose."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    ways = [lambda i: a @ b.T]
    if dtype == torch.float32 and device == "cpu":
        ways.append(lambda i: linear(a, b))
    clocks = [timing.sampler(way, 1, device) for way in ways]
    with torch.no_grad():
        return 2 * side**3 / min(statistics.median(clock() for _ in range(rounds)) for clock in clocks)


def absent(name: str, device: str) -> bool:
    """Whether there is no such device here; says so on stderr under the name of what was to run."""
    if device != "cuda" or torch.cuda.is_available():
        return False
    print(f"{name}: no CUDA device here", file=sys.stderr)
    return True


def limit(
    machine: dict | None, dtype: str, moved: int | None, flops: int | None
) -> tuple[float, str] | tuple[None, None]:
    """(the least seconds that the machine allows, "memory" or "matrix", whichever takes longer); None where unknown."""
    if machine is None:
        return None, None
    ways = []
    if moved and machine["copy_gb_s"]:
        ways.append((moved / (machine["copy_gb_s"] * 1e9), "memory"))
    if flops and dtype in machine["matrix_tflops"]:
        ways.append((flops / (machine["matrix_tflops"][dtype] * 1e12), "matrix"))
    return max(ways, default=(None, None))


def share(machine: dict | None, dtype: str, flops: int | None, *seconds: float) -> dict[str, Any]:
    """What a record says of the limit, for work of so many FLOPs that one side or several took so long for: "flops",
    "limit" and, a number for one side and a list for several, "limit_share"; nothing where the limit is unknown."""
    least, by = limit(machine, dtype, None, flops)
    if least is None:
        return {}
    shares = [least / each for each in seconds]
    return {"flops": flops, "limit": by, "limit_share": shares if len(shares) > 1 else shares[0]}


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of the products, convolutions and attention of a call, in torch's own operators: what our kernels compute
    is not seen, so count the plain peer."""
    aten = torch.ops.aten
    more = {  # of a CPU, which torch's table leaves out
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that torch's allocator held at once during a call above what it held before, and what the call gives
    back is part of it. On a CPU by the profiler's record of allocations; what a kernel takes by itself is not in it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = call()
    del out
    held = most = 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def condition(device: str) -> dict[str, Any]:
    """What is known of how busy, fast and hot the machine is now; keys that the system does not tell are absent."""
    found: dict[str, Any] = {}
    if (busy := load()) is not None:
        found["load"] = round(busy, 2)
    if device == "cuda":
        names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        told = environment.output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
        if told:
            keys = ("sm_mhz", "memory_mhz", "temperature_c", "watts")
            found |= {key: float(v) for key, v in zip(keys, told.splitlines()[0].split(", ")) if _number(v)}
        return found
    clocks = [float(line.split(":")[1]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    if clocks:
        found["mhz"] = round(statistics.mean(clocks))
    zones = [_lines(path) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    if heat := [int(lines[0]) / 1000 for lines in zones if lines and lines[0].isdigit()]:
        found["temperature_c"] = max(heat)
    return found


def headline(device: str) -> str:
    """One line: what this machine is, and whether others are using it."""
    env, state = environment.describe(device), condition(device)
    words = [env["device"]]
    if device == "cuda":
        words.append(f"CUDA {env.get('cuda')}, driver {env.get('driver')}, triton {env['triton']}")
    else:
        words.append(f"{env['cpu_threads']} threads, kernels {env['isa'] or 'none (reference alone)'}")
    commit = f" at {env['commit']}{' with changes' if env['dirty'] else ''}" if env["commit"] else ""
    words.append(f"torch {env['torch']}, maefast {env['maefast']}{commit}")
    busy = state.get("load")
    if busy is not None and busy > BUSY:
        words.append(f"BUSY: a load of {busy} in the last minute, so times may say little")
    return "; ".join(words)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
