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

TARGETS = (80, 90, 100)
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


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
    seconds: float
    error: str


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(count: int) -> torch.Tensor:
    return meta(count, dtype=torch.int32)


def mask_cases():
    from maefast.kernels.mask import token_mask

    for name, dtype in DTYPES.items():
        for batch, tokens in ((256, 196), (64, 50), (64, 784), (32, 1568), (8, 4096), (8, 8192)):
            for by_position in (False, True):
                order = "position" if by_position else "score"
                args = meta(batch, tokens, dtype=dtype), ints(batch + 1), batch * tokens // 4, by_position
                yield f"{name} N={tokens} {order}", token_mask, args
    yield "f32 N=16384 score (large)", token_mask, (meta(2, 16384), ints(3), 8192, False)


def embed_cases():
    from maefast.kernels import embed

    for name, dtype in DTYPES.items():
        for batch, tokens, width, prefix in (
            (256, 196, 768, 1),
            (64, 196, 192, 0),
            (32, 100, 70, 3),
            (256, 256, 1280, 1),
        ):
            rows, kept, cu = batch * tokens, batch * (tokens // 4), ints(batch + 1)
            label = f"{name} N={tokens} D={width} P={prefix}"
            x = meta(batch, prefix + tokens, width, dtype=dtype)
            packed = meta(kept + batch * prefix, width, dtype=dtype)
            yield label, embed.gather_tokens, (x, ints(kept), cu, tokens // 4, prefix, True)
            yield label, embed.gather_tokens_backward, (packed, ints(rows), cu, prefix, True, False)
            y, wide = meta(kept, width, dtype=dtype), meta(kept + batch * prefix, width)
            pos, lead = meta(tokens, width), meta(prefix, width) if prefix else None
            yield f"{label} -> f32", embed.place_tokens, (y, ints(kept), cu, tokens, pos, lead)
            yield label, embed.place_tokens_backward, (wide, ints(rows), cu, prefix, True, prefix > 0, dtype)
            yield f"{label} no sums", embed.place_tokens_backward, (wide, ints(rows), cu, prefix, False, False, dtype)
        for shape, patch in (
            ((256, 3, 1, 224, 224), (1, 16, 16)),
            ((128, 3, 1, 224, 224), (1, 14, 14)),
            ((32, 3, 16, 224, 224), (2, 16, 16)),
            ((64, 1, 1, 1024, 128), (1, 16, 16)),
            ((64, 3, 1, 64, 64), (1, 8, 8)),
        ):
            tokens = shape[2] // patch[0] * (shape[3] // patch[1]) * (shape[4] // patch[2])
            values = shape[1] * patch[0] * patch[1] * patch[2]
            kept = shape[0] * (tokens // 4)
            label = f"f32 -> {name} C={shape[1]} p={patch}"
            yield label, embed.patch_rows, (meta(*shape), ints(kept), patch, dtype)
            grad = meta(kept, values, dtype=dtype)
            yield label, embed.patch_rows_backward, (grad, ints(shape[0] * tokens), shape, patch, torch.float32)


def restore_cases():
    from maefast.kernels import restore

    for name, dtype in DTYPES.items():
        for batch, tokens, width, prefix in ((256, 196, 512, 1), (64, 1568, 384, 0), (32, 100, 70, 3)):
            kept, cu, token = batch * (tokens // 4), ints(batch + 1), meta(width, dtype=dtype)
            lists = ints(kept), ints(batch * tokens - kept)
            x, pos = meta(kept + batch * prefix, width, dtype=dtype), meta(prefix + tokens, width, dtype=dtype)
            grad = meta(batch, prefix + tokens, width, dtype=dtype)
            for first in (False, True):
                label = f"{name} N={tokens} D={width} P={prefix}{' visible first' if first else ''}"
                yield label, restore.restore_tokens, (x, *lists, cu, token, pos, prefix, first, False)
                plan = (*lists, ints(batch * tokens), cu)
                for rows, on_masked, need in (
                    (prefix + tokens, False, True),
                    (0, False, True),
                    (tokens, True, True),
                    (0, False, False),
                ):
                    sums = f" pos rows {rows}{' masked' if on_masked else ''}{', mask token' if need else ''}"
                    args = (grad, *plan, rows, prefix, first, on_masked, need, dtype)
                    yield label + sums, restore.restore_tokens_backward, args


def loss_cases():
    from maefast.kernels import loss

    shapes = (
        ("16x16x3", (256, 3, 1, 224, 224), (1, 16, 16), (0, 1, 2, 3)),
        ("14x14x3", (128, 3, 1, 224, 224), (1, 14, 14), (1,)),
        ("2x16x16x3", (32, 3, 16, 224, 224), (2, 16, 16), (1, 2)),
        ("8x8x3", (64, 3, 1, 64, 64), (1, 8, 8), (1,)),
        ("4x4x1", (64, 1, 1, 32, 32), (1, 4, 4), (1,)),
        ("32x32x3", (64, 3, 1, 224, 224), (1, 32, 32), (1, 2)),
        ("4x32x32x2", (2, 2, 4, 224, 224), (4, 32, 32), (1,)),
        ("4x64x64x2 (large)", (1, 2, 4, 256, 256), (4, 64, 64), (1,)),
    )
    for label, shape, patch, norms in shapes:
        tokens = shape[2] // patch[0] * (shape[3] // patch[1]) * (shape[4] // patch[2])
        values = shape[1] * patch[0] * patch[1] * patch[2]
        count = shape[0] * (tokens - tokens // 4)
        for name, dtype in DTYPES.items():
            for norm in norms:
                for packed, first, kind in ((True, False, 0), (False, True, 1)):
                    images = meta(*shape)
                    pred = meta(count if packed else shape[0] * tokens, values, dtype=dtype)
                    args = (patch, packed, first, norm, kind, 1.0)
                    text = f"{name} {label} norm {norm} {'cpp' if first else 'ppc'}"
                    yield text, loss.patch_loss, (pred, images, ints(count), *args)
                    stats = meta(count, shape[1] if norm == 2 else 1, 2)
                    index = ints(count), ints(shape[0] * tokens)
                    back = (meta(count), pred, images, *index, stats, *args)
                    for images_too in (False, True):
                        more = text + (" grad images" if images_too else "")
                        yield more, loss.patch_loss_backward, (*back, images_too)


def record() -> list[Launch]:
    """Every distinct launch of all cases."""
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
            if param.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
                signature[param.name] = "*" + (short.get(value.dtype) or f"i{8 * value.element_size()}")
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        launch = Launch(label, self.fn.__module__, self.fn.__name__, signature, constants, attributes, options)
        seen.setdefault(repr(launch[1:]), launch)

    original, JITFunction.run = JITFunction.run, run
    try:
        for cases in (mask_cases, embed_cases, restore_cases, loss_cases):
            for label, op, args in cases():  # noqa: B007 (run reads it)
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
    start = time.perf_counter()
    try:
        function = getattr(importlib.import_module(launch.module), launch.kernel)
        source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    except Exception as error:
        return Result(launch, target, 0, 0, 0, 0, 0, time.perf_counter() - start, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    registers, stack, static = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Result(
        launch,
        target,
        registers,
        stack,
        static + kernel.metadata.shared,
        widest(ptx, "ld"),
        widest(ptx, "st"),
        seconds,
        "",
    )


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


def run_all(targets=TARGETS, jobs: int = 2) -> list[Result]:
    work = [(launch, target) for launch in record() for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, work, chunksize=4))


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
    args = parser.parse_args()
    start = time.perf_counter()
    results = run_all(args.targets, args.jobs)
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
