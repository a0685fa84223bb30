"""What a build compiles: CPU instruction sets and CUDA architectures, and why.

By default what this machine can use, because all of it takes minutes more; the wheels and CI ask for everything:

    MAEFAST_ISAS   native (default: those of this CPU), all, or names such as `avx2 avx512`; `plain` always comes too
    MAEFAST_CUDA   auto (default: where torch has CUDA, nvcc is there and a GPU that is here can run it), on, off
    MAEFAST_CUDA_ARCHS   native (default: those of the GPUs here; all where there is none), all, or CMake's, such as 90a

Variables of the environment win over those of CMake. Run as a script it prints `isas|why` for the argument `cpu`, and
`on or off|architectures|why` for `cuda` (CMake lists); csrc/build/{cpu,cuda}.cmake call it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ISAS = ("plain", "avx2", "avx512", "avx512bf16", "amx")  # csrc/cpu/isa.h
# What the system calls the extensions that each set uses (csrc/build/cpu.cmake).
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512_bf16"}
NEEDS = {"plain": set(), "avx2": _AVX2, "avx512": _AVX512, "avx512bf16": _BF16, "amx": _BF16 | {"amx_tile", "amx_bf16"}}
# Ampere, Hopper (with its own instructions), Blackwell; PTX of the last for what comes later.
CUDA_ARCHS = ("80", "90a", "100")
OLDEST = 80  # bfloat16 and the matrix instructions that the kernels use


class Cuda(NamedTuple):
    build: bool
    archs: tuple[str, ...]
    why: str


def choose_isas(asked: str, compiles: list[str], cpu: set[str] | None) -> tuple[tuple[str, ...], str]:
    """The instruction sets to compile, and why.

    Args:
        asked: "native", "all" or names, separated by spaces, commas or semicolons.
        compiles: those that the compiler knows, `plain` among them.
        cpu: extensions of this CPU (`cpu_flags()`), or None where nobody can tell.

    Raises:
        ValueError: an unknown name, or one that the compiler does not know.
    """
    names = re.findall(r"[^\s,;]+", asked.lower()) or ["native"]
    known = tuple(isa for isa in ISAS if isa in compiles)
    if names == ["all"]:
        return known, "all that the compiler knows"
    if names == ["native"]:
        if cpu is None:
            return known, "all that the compiler knows, as this CPU's are unknown"
        return tuple(isa for isa in known if NEEDS[isa] <= cpu), "those of this CPU (MAEFAST_ISAS=all: every one)"
    for name in names:
        if name not in ISAS:
            raise ValueError(f"MAEFAST_ISAS: no instruction set {name!r}; choose native, all or of {', '.join(ISAS)}")
        if name not in known:
            raise ValueError(f"MAEFAST_ISAS: the compiler has no {name} for this processor")
    names += ["avx512bf16"] * ("amx" in names)  # where the system gives no leave for tiles
    names += ["plain"] + ["avx512"] * ("avx512bf16" in names)  # whose copies are of attention alone
    return tuple(isa for isa in known if isa in names), "asked for by MAEFAST_ISAS"


def cpu_flags() -> set[str] | None:
    """Extensions of this CPU as Linux names them, or None."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    flags = re.search(r"^flags\s*:(.*)$", text, re.M)
    return set(flags.group(1).split()) if flags else None


def choose_cuda(
    asked: str, archs: str, torch_version: str, torch_cuda: str | None, known: set[int] | None, gpus: list[str]
) -> Cuda:
    """Whether to compile the CUDA ops, for which architectures (CMake's CUDA_ARCHITECTURES), and why.

    Args:
        asked: "auto", "on" or "off".
        archs: "native", "all" or CMake's architectures, separated by spaces, commas or semicolons.
        torch_version, torch_cuda: the torch that the build goes with; None as CUDA for a CPU-only one.
        known: numbers of the architectures that nvcc compiles for, None without nvcc.
        gpus: compute capabilities of the GPUs of this machine, such as "9.0".

    Raises:
        ValueError: bad names; "on" without nvcc; an nvcc that knows none of what is wanted.
    """
    if asked not in ("auto", "on", "off"):
        raise ValueError(f"MAEFAST_CUDA={asked}: choose auto, on or off")
    if asked == "off":
        return Cuda(False, (), "MAEFAST_CUDA=off")
    if asked == "auto" and torch_cuda is None:
        return Cuda(False, (), f"torch {torch_version} has no CUDA (MAEFAST_CUDA=on: all the same)")
    if known is None:
        if asked == "on":
            raise ValueError("MAEFAST_CUDA=on, but no working CUDA compiler was found")
        return Cuda(False, (), "no working CUDA compiler")
    names = re.findall(r"[^\s,;]+", archs.lower()) or ["native"]
    if names not in (["native"], ["all"]):
        return Cuda(True, tuple(names), "asked for by MAEFAST_CUDA_ARCHS")
    if names == ["native"] and gpus:
        young = sorted({gpu for gpu in gpus if _number(gpu) >= OLDEST})
        if young:
            return Cuda(True, _native(young, known), "the GPUs of this machine (MAEFAST_CUDA_ARCHS=all: every one)")
        if asked == "auto":
            return Cuda(False, (), f"the GPUs here are older than sm_{OLDEST} (MAEFAST_CUDA=on: all the same)")
    found = [arch for arch in CUDA_ARCHS if _number(arch) in known]
    if not found:
        raise ValueError(f"nvcc compiles for none of sm_{', sm_'.join(CUDA_ARCHS)}")
    why = "every architecture" if names == ["all"] else "every architecture, as there is no GPU to tell"
    return Cuda(True, (*(f"{arch}-real" for arch in found), f"{_number(found[-1])}-virtual"), why)


def _native(gpus: list[str], known: set[int]) -> tuple[str, ...]:
    """Machine code for each GPU; PTX of the newest that nvcc knows for one that is newer still."""
    archs = []
    for number in map(_number, gpus):
        if number in known:
            archs.append(f"{number}a-real" if number == 90 else f"{number}-real")
        else:
            archs.append(f"{max(n for n in known if n < number)}-virtual")
    return tuple(dict.fromkeys(archs))


def _number(arch: str) -> int:
    """90 of "9.0", "90a" and "90-real"."""
    return int("".join(re.findall(r"\d", arch)))


def nvcc_archs(nvcc: str) -> set[int] | None:
    """Numbers of the architectures that `nvcc` compiles for; None where it does not run."""
    listed = _output(nvcc, "--list-gpu-arch")
    return None if listed is None else {int(n) for n in re.findall(r"compute_(\d+)\b", listed)} or None


def gpus_here() -> list[str]:
    """Compute capabilities of the GPUs of this machine, by the driver's own tool; empty where there is none."""
    listed = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return re.findall(r"^\s*(\d+\.\d+)\s*$", listed or "", re.M)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("cpu", "cuda"))
    for name in ("isas", "compiles", "cuda", "archs", "nvcc", "torch-version", "torch-cuda"):
        parser.add_argument(f"--{name}", default="")
    args = parser.parse_args()
    try:
        if args.part == "cpu":
            isas, why = choose_isas(os.environ.get("MAEFAST_ISAS") or args.isas, args.compiles.split(";"), cpu_flags())
            print(";".join(isas), why, sep="|")
        else:
            choice = choose_cuda(
                (os.environ.get("MAEFAST_CUDA") or args.cuda or "auto").lower(),
                os.environ.get("MAEFAST_CUDA_ARCHS") or args.archs,
                args.torch_version,
                None if args.torch_cuda in ("", "none") else args.torch_cuda,
                nvcc_archs(args.nvcc) if args.nvcc else None,
                gpus_here(),
            )
            print("on" if choice.build else "off", ";".join(choice.archs), choice.why, sep="|")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
