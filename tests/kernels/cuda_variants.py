"""The CUDA C++ kernels of csrc/cuda as variants: from the library that was built or, where it lacks an architecture,
from a compilation to machine code alone, which takes minutes. Neither needs a GPU, nor a CUDA torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from maefast import _native
from tests.kernels import resources
from tests.kernels.occupancy import LIMITS
from tests.kernels.variants import Variant

SOURCES = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}  # of csrc/build/cuda.cmake, which knows no sm_100a
TORCH_VERSION = "0x020a000000000000"  # as csrc/build/torch.cmake
WORDS = {"5uint4": 16, "5uint2": 8, "j": 4, "t": 2, "h": 1}


class Launch(NamedTuple):
    """Threads and bytes of shared memory of a block."""

    threads: int
    shared: int


def _padded(n: int) -> int:
    return (n + 15) // 16 * 16


def short_launch(depth: int, length: int, backward: bool) -> Launch:
    """`launch` of attention.cu, for as many keys as queries."""
    rows = _padded(length)
    size = 2 * ((4 if backward else 3) * rows * (depth + 8) + (2 * rows * (rows + 8) if backward else 0))
    return Launch(32 * (rows // 16), size)


def forward_launch(depth: int, length: int, limit: int) -> Launch:
    """`fwd_shape` of attention_tiled_fwd.cuh."""
    size = lambda warps: 2 * (depth + 8) * (16 * warps + 256)  # noqa: E731
    tiles, most = _padded(length) // 16, 8
    while most > 1 and size(most) > limit:
        most -= 1
    warps = -(-tiles // -(-tiles // most))
    return Launch(32 * warps, size(warps))


def backward_blocks(depth: int, length: int) -> int:
    """`bwd_blocks` of attention_tiled_shared.cuh."""
    return 2 if depth <= 48 or (depth == 64 and 128 < length <= 224) else 1


def backward_launch(depth: int, length: int, limit: int) -> Launch:
    """`bwd_shape` of attention_tiled_shared.cuh."""
    blocks = backward_blocks(depth, length)
    many = depth <= 48 or (depth == 64 and blocks == 1)  # warps: eight hold their sums, else seven
    keys, stride = 16 * blocks, depth + 8
    first, region = 4 * 32 * stride + 16 * stride + 128, 2 * keys * stride + 32 * keys
    size = lambda warps: 2 * (first + warps * region)  # noqa: E731
    most, need = 8 if many else 7, -(-length // keys)
    while most > 1 and size(most) > limit:
        most -= 1
    warps = -(-need // -(-need // most))
    return Launch(32 * (warps + 1), size(warps))


def describe(function: str, target: int) -> tuple[str, str, str, Launch] | None:
    """(family, kernel, case, launch) of a mangled name; None for what is no kernel of ours.

    Attention is launched for 50 tokens, above 64 for 197 (ViT at 224 px) or, where that goes elsewhere, 256.
    """
    if (match := re.search(r"\d+([a-z][a-z_]*_kernel)I(.*?)EEv", function)) is None:
        return None
    kernel, arguments = match.groups()
    if arguments in WORDS:
        return "embed", kernel, f"rows in words of {WORDS[arguments]} B", Launch(256, 0)
    dtype = "f16" if "6__half" in arguments else "bf16"
    depth, *blocks = map(int, re.findall(r"Li(\d+)E", arguments))
    limit = LIMITS[target].shared_block
    length = 197 if "tiled" in kernel else 50
    if blocks and backward_blocks(depth, length) != blocks[0]:
        length = 256
    if "tiled" not in kernel:
        launch = short_launch(depth, length, "bwd" in kernel)
    else:
        launch = (backward_launch if blocks else forward_launch)(depth, length, limit)
    return "attention", kernel, f"{dtype} S={length} D={depth}", launch


def nvcc() -> str | None:
    home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (home if os.path.exists(home) else None)


def built() -> Path | None:
    """The CUDA library, if it was built for all of these architectures."""
    library = _native.find_library("cuda")
    if library is None or resources.tools() is None:
        return None
    return library if set(ARCHITECTURES.values()) <= resources.architectures(library) else None


def compiler() -> str | None:
    """ "nvcc 13.0.88" of the library or else of this machine; None without either."""
    if built() is not None and _native.C is not None:
        return f"nvcc {_native.C.build_info()['cuda']}"
    if (tool := nvcc()) is None:
        return None
    text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    return "nvcc " + re.search(r"V(\d[\d.]*)", text).group(1)


def variants(target: int, compiles: bool = True) -> list[Variant]:
    """All kernels for sm_<target>, by name; [] where there is neither a library that has them nor nvcc.

    compiles: whether nvcc may be called.
    """
    if library := built():
        found = resources.extract(library, ARCHITECTURES[target])
    elif compiles and (tool := nvcc()):
        found = compile_only(tool, ARCHITECTURES[target])
    else:
        return []
    rows = []
    for function, code in found.items():
        if (known := describe(function, target)) is not None:
            family, kernel, case, launch = known
            warps, used = launch.threads // 32, {"found": code.resources, "code": code.instructions}
            rows.append(Variant(family, kernel, case, 0, target, warps, launch.shared, language="cuda", **used))
    rows.sort(key=lambda row: (row.family, row.kernel, row.case))
    return [row._replace(launch=number) for number, row in enumerate(rows)]


def compile_only(tool: str, architecture: str) -> dict[str, resources.Code]:
    """Flags as csrc/build/cuda.cmake has them."""
    found = {}
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_VERSION}"]
    flags += ["-I", str(SOURCES), "-isystem", str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            cubin = Path(folder, source.stem + ".cubin")
            command = [tool, "--cubin", "-arch", architecture, *flags, source, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
            found |= resources.load(cubin)
    return found
