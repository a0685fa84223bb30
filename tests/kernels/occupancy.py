"""How many blocks of a kernel a multiprocessor holds at once, and what it is that holds no more.

The rules are those of NVIDIA's own calculator (`cuda_occupancy.h`, part of every CUDA toolkit), with as much of the L1
cache given to shared memory as there may be, which a driver does by itself for kernels that want it.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024


class Limits(NamedTuple):
    """Of a multiprocessor: bytes of shared memory, of them for one block, columns of tensor memory."""

    shared: int
    shared_block: int
    columns: int


# CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability": for 8.0,
# 9.0 and 10.0 alike 64 warps, 32 blocks, 65,536 registers (one block may have them all), 255 registers a thread, 1024
# threads a block; 164 KiB of shared memory on 8.0 (163 for a block), 228 (227) on 9.0 and 10.0. Tensor memory: PTX ISA,
# "Tensor Memory"; a block waits until its columns are free.
LIMITS = {
    80: Limits(164 * KIB, 163 * KIB, 0),
    90: Limits(228 * KIB, 227 * KIB, 0),
    100: Limits(228 * KIB, 227 * KIB, 512),
}
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536
BLOCK_WARPS, THREAD_REGISTERS = 32, 255
# cuda_occupancy.h: registers are given to warps in steps of 256, in each of four parts of a multiprocessor; shared
# memory in steps of 128 bytes, with 1 KiB of each block that the driver keeps (the guide, "Shared Memory" of 8.x).
PARTS, REGISTER_STEP, SHARED_STEP, RESERVED = 4, 256, 128, KIB


class Occupancy(NamedTuple):
    """blocks and warps that a multiprocessor holds; share of the 64 warps that it could; held: what allows no more,
    among "registers", "shared memory", "tensor memory", "block size" and "blocks", () where all 64 warps fit."""

    blocks: int
    warps: int
    share: float
    held: tuple[str, ...]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(target: int, warps: int, registers: int, shared: int, columns: int = 0) -> Occupancy:
    """target: 80, 90 or 100. warps: of a block. registers: of a thread. shared: bytes of a block, static and dynamic,
    without what the driver keeps. columns: of tensor memory, for a block. A block that fits nowhere gives 0."""
    if target not in LIMITS:
        raise ValueError(f"limits of sm_{target} are not known, only of {', '.join(f'sm_{t}' for t in LIMITS)}")
    if not 1 <= warps <= BLOCK_WARPS:
        raise ValueError(f"a block has 1 to {BLOCK_WARPS} warps, not {warps}")
    if min(registers, shared, columns) < 0:
        raise ValueError(f"negative resources: {registers} registers, {shared} bytes, {columns} columns")
    limits = LIMITS[target]
    most = {"block size": WARPS // warps, "blocks": BLOCKS}
    each = _up(max(registers, 1) * 32, REGISTER_STEP)  # of a warp
    fits = registers <= THREAD_REGISTERS and each * _up(warps, PARTS) <= REGISTERS
    most["registers"] = REGISTERS // PARTS // each * PARTS // warps if fits else 0
    taken = _up(shared + RESERVED, SHARED_STEP)
    most["shared memory"] = limits.shared // taken if shared <= limits.shared_block else 0
    if columns:
        most["tensor memory"] = limits.columns // columns
    blocks = min(most.values())
    held = tuple(sorted(name for name, count in most.items() if count == blocks))
    return Occupancy(blocks, blocks * warps, blocks * warps / WARPS, () if blocks * warps == WARPS else held)
