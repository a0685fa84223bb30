"""What a compiled kernel takes of a GPU, read from its machine code: registers, local and shared memory, and the widths
of its accesses to global memory. Needs no GPU, only cuobjdump and nvdisasm, which come with Triton and with CUDA.

Counts are of instructions as they stand in the code: one in a loop counts once.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Resources(NamedTuple):
    """registers: a thread. stack: bytes of local memory a thread. shared: static bytes a block, without what the driver
    keeps for itself. loads, stores: {bytes a thread moves at once: instructions} on global memory, copies to shared
    memory among the loads. local_loads, local_stores: bytes that a thread's instructions move to and from local
    memory, which is what ptxas calls spill loads and stores. bulk: copies by the tensor memory accelerator."""

    registers: int
    stack: int
    shared: int
    loads: dict[int, int] = {}  # noqa: RUF012 (never changed)
    stores: dict[int, int] = {}  # noqa: RUF012
    local_loads: int = 0
    local_stores: int = 0
    bulk: int = 0

    @property
    def spilled(self) -> int:
        """Bytes a thread; 0 where all fits into registers."""
        return max(self.stack, self.local_loads, self.local_stores)


def wide_share(widths: dict[int, int]) -> float | None:
    """The share of the bytes that go by accesses of 16 bytes or more; None without any access."""
    total = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width >= 16) / total if total else None


class Code(NamedTuple):
    """A function of a cubin: what it takes without its accesses, and its machine code."""

    resources: Resources
    instructions: bytes


USAGE = re.compile(r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE)
# Of an instruction, predicate or not, only the name with its suffixes counts: LDG.E.128.CONSTANT.
ACCESS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?"
    r"(LDG|LDGSTS|LD|STG|ST|LDL|STL|UTMALDG|UTMASTG|UBLKCP)((?:\.\w+)*) ",
    re.MULTILINE,
)
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
KINDS = {"LDG": "load", "LDGSTS": "load", "LD": "load", "STG": "store", "ST": "store", "LDL": "in", "STL": "out"}
RESERVED = ".nv.shared.reserved.0"  # a section that says that the driver's own KiB is counted among the static bytes


def load(cubin: bytes | Path) -> dict[str, Code]:
    """{function: its code}. Raises RuntimeError without cuobjdump, or for what is no cubin."""
    if isinstance(cubin, Path):
        cubin = cubin.read_bytes()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = USAGE.findall(_run("cuobjdump", "--dump-resource-usage", file.name))
    parts = _sections(cubin)
    found = {}
    for name, *numbers in usage:
        registers, stack, shared = map(int, numbers)
        if RESERVED in parts:
            shared = max(0, shared - 1024)
        found[name] = Code(Resources(registers, stack, shared), parts.get(f".text.{name}", b""))
    return found


def read(codes: list[Code], architecture: str) -> list[Resources]:
    """All that they take, in one call of nvdisasm, whose start costs more than the work.

    architecture: "sm_90a". Raises RuntimeError without nvdisasm.
    """
    if not codes:
        return []
    # Everything is laid end to end, and an address tells whose instruction it is.
    starts = list(itertools.accumulate((len(code.instructions) for code in codes), initial=0))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code.instructions for code in codes))
        file.flush()
        text = _run("nvdisasm", "--no-dataflow", "--binary", architecture.replace("sm_", "SM"), file.name)
    seen: list[list[tuple[str, str]]] = [[] for _ in codes]
    for address, name, suffixes in ACCESS.findall(text):
        seen[bisect.bisect_right(starts, int(address, 16)) - 1].append((name, suffixes))
    return [_with_accesses(code.resources, accesses) for code, accesses in zip(codes, seen)]


def _with_accesses(resources: Resources, accesses: list[tuple[str, str]]) -> Resources:
    widths: dict[str, Counter] = {kind: Counter() for kind in ("load", "store", "in", "out")}
    bulk = 0
    for name, suffixes in accesses:
        if name not in KINDS:
            bulk += 1
            continue
        width = next((WIDTHS[part] for part in suffixes.split(".") if part in WIDTHS), 4)
        widths[KINDS[name]][width] += 1
    moved = {kind: sum(width * count for width, count in widths[kind].items()) for kind in ("in", "out")}
    return resources._replace(
        loads=dict(sorted(widths["load"].items())),
        stores=dict(sorted(widths["store"].items())),
        local_loads=moved["in"],
        local_stores=moved["out"],
        bulk=bulk,
    )


def architectures(library: Path) -> set[str]:
    """Those that a library holds machine code for, such as "sm_90a"."""
    return set(re.findall(r"\.(sm_\d+a?)\.", _run("cuobjdump", "--list-elf", str(library))))


def extract(library: Path, architecture: str) -> dict[str, Code]:
    """{function: its code} of what a library holds for "sm_90a"; {} where it holds nothing for it."""
    found: dict[str, Code] = {}
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "--extract-elf", "all", str(library.resolve()), folder=folder)
        for path in sorted(Path(folder).glob(f"*.{architecture}.cubin")):
            found |= load(path)
    return found


def _sections(cubin: bytes) -> dict[str, bytes]:
    """{name: content} of a 64-bit ELF file."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * i) for i in range(count)]
    texts = cubin[headers[names][4] :]
    return {
        texts[header[0] : texts.index(b"\0", header[0])].decode(): cubin[header[4] : header[4] + header[5]]
        for header in headers
    }


def _run(name: str, *arguments: str, folder: str | None = None) -> str:
    if (place := tools()) is None:
        raise RuntimeError("cuobjdump and nvdisasm were not found; Triton and CUDA have them")
    done = subprocess.run([os.path.join(place, name), *arguments], capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {arguments[-1]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@functools.cache
def tools() -> str | None:
    """Where cuobjdump and nvdisasm are: Triton's, or those of an installed CUDA. None without them."""
    folders = []
    if spec := importlib.util.find_spec("triton"):
        folders.append(os.path.join(os.path.dirname(str(spec.origin)), "backends", "nvidia", "bin"))
    if found := shutil.which("cuobjdump"):
        folders.append(os.path.dirname(found))
    folders.append(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    has_both = lambda folder: all(os.path.exists(os.path.join(folder, tool)) for tool in ("cuobjdump", "nvdisasm"))  # noqa: E731
    return next(filter(has_both, folders), None)
