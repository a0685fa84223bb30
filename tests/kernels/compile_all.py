"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU: `python -m tests.kernels.compile_all`.

The launchers run on meta tensors and their launches are recorded, not executed, so exactly what they would launch
(their own block sizes, warps and specialisations) is compiled. Printed for each: registers a thread, stack bytes
(spills), static + dynamic shared memory, and the widest global load and store in the PTX. Exit status 1 where a
kernel does not compile or a variant of a common shape spills.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from tests.kernels.compile_cases import CASES

TARGETS = (80, 90, 100)
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Launch(NamedTuple):
    """One recorded launch, as Triton would specialise it."""

    case: str
    module: str
    kernel: str
    signature: dict
    constants: dict
    attributes: dict
    options: dict


class Result(NamedTuple):
    launch: Launch
    target: int
    registers: int
    stack: int
    shared: int
    load: int
    store: int
    error: str


DIVISIBLE = [["tt.divisibility", 16]]


def kind_of(value, special: bool) -> tuple[str, bool]:
    """The type that Triton gives an argument, and whether it takes it for a multiple of 16."""
    if isinstance(value, torch.Tensor):
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        return "*" + (short.get(value.dtype) or f"i{8 * value.element_size()}"), special
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", special and value % 16 == 0


def record(full: bool) -> list[Launch]:
    """Every distinct launch of the cases."""
    from triton.runtime.jit import JITFunction

    seen: dict[str, Launch] = {}
    label = ""

    def run(self, *args, grid, warmup, **kwargs):
        signature, constants, attributes, options = {}, {}, {}, {}
        bound = dict(zip(self.arg_names, args))
        bound.update({key: value for key, value in kwargs.items() if key in self.arg_names})
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        assert set(bound) == set(self.arg_names)
        assert min(grid) > 0
        for position, param in enumerate(self.params):
            value = bound[param.name]
            special = not param.do_not_specialize
            if isinstance(value, tuple):
                kinds = [kind_of(item, special) for item in value]
                signature[param.name] = tuple(kind for kind, _ in kinds)
                attributes.update({(position, i): DIVISIBLE for i, (_, whole) in enumerate(kinds) if whole})
                continue
            if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            signature[param.name], whole = kind_of(value, special)
            if whole:
                attributes[(position,)] = DIVISIBLE
        launch = Launch(label, self.fn.__module__, self.fn.__name__, signature, constants, attributes, options)
        seen.setdefault(repr(launch[1:]), launch)

    original, JITFunction.run = JITFunction.run, run
    try:
        for cases in CASES:
            for label, op, args in cases(full):  # noqa: B007 (run reads it)
                op(*args)
    finally:
        JITFunction.run = original
    return list(seen.values())


def compile_one(job: tuple[Launch, int]) -> Result:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, target = job
    try:
        function = getattr(importlib.import_module(launch.module), launch.kernel)
        source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    except Exception as error:
        return Result(launch, target, 0, 0, 0, 0, 0, f"{type(error).__name__}: {error}")
    registers, stack, static = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    shared = static + kernel.metadata.shared
    return Result(launch, target, registers, stack, shared, widest(ptx, "ld"), widest(ptx, "st"), "")


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, static shared bytes); -1 each where no cuobjdump is at hand."""
    tool = cuobjdump()
    if tool is None:
        return -1, -1, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", text))
    if not usage:
        return -1, -1, 0
    return int(usage["REG"]), int(usage["STACK"]), int(usage["SHARED"])


def cuobjdump() -> str | None:
    import triton

    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")
    return next((path for path in (bundled, shutil.which("cuobjdump"), home) if path and os.path.exists(path)), None)


def widest(ptx: str, kind: str) -> int:
    """Bytes of the widest global access of this kind."""
    found = re.findall(rf"\b{kind}\.global(?:\.[a-z:0-9_]+)*?(?:\.v(\d))?\.b(\d+) ", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def run_all(full: bool = False, targets=TARGETS, jobs: int = 2) -> list[Result]:
    work = [(launch, target) for launch in record(full) for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, work, chunksize=2))


def problem(result: Result) -> str:
    """Why this result is not acceptable, or ''."""
    if result.error:
        return result.error.splitlines()[0]
    if result.shared > MAX_SHARED[result.target]:
        return f"{result.shared} bytes of shared memory"
    if result.stack > 0 and "(large)" not in result.launch.case:
        return f"spills: {result.stack} bytes of stack"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--full", action="store_true", help="every dtype, size and flag; ten minutes on two cores")
    args = parser.parse_args()
    start = time.perf_counter()
    results = run_all(args.full, args.targets, args.jobs)
    print(f"{'kernel':28} {'sm':>4} {'warps':>5} {'regs':>4} {'stack':>5} {'shared':>6} {'load':>4} {'store':>5}  case")
    for r in results:
        warps = r.launch.options["num_warps"]
        numbers = f"{warps:5} {r.registers:4} {r.stack:5} {r.shared:6} {r.load:4} {r.store:5}"
        wrong = "  <-- " + problem(r) if problem(r) else ""
        print(f"{r.launch.kernel:28} {r.target:4} {numbers}  {r.launch.case}{wrong}")
    bad = [r for r in results if problem(r)]
    if any(r.registers < 0 for r in results):
        print("no cuobjdump found: registers and spills are not known")
    total, took = len(results), time.perf_counter() - start
    print(f"compiled {total - len(bad)} of {total} (kernel, target) pairs in {took:.0f} s, {len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
