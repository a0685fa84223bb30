"""The calculator of occupancy, against values derived by hand from the documented limits."""

from __future__ import annotations

import pytest

from tests.kernels.occupancy import KIB, occupancy


@pytest.mark.parametrize(
    ("warps", "registers", "blocks", "held"),
    [
        (4, 32, 16, ()),  # 32 * 32 = 1024 a warp, 16 in each quarter of 16,384: all 64 warps
        (4, 33, 12, ("registers",)),  # 1056, given as 1280: 12 in a quarter, 48 warps
        (8, 128, 2, ("registers",)),  # 4096: 4 in a quarter
        (8, 255, 1, ("registers",)),  # 8160, given as 8192: 2 in a quarter
        (5, 40, 9, ("registers",)),  # 1280: 48 warps hold nine blocks of five
        (16, 255, 0, ("registers",)),  # 131,072 registers
        (32, 64, 1, ("registers",)),  # 2048: 8 in a quarter, exactly one block of 32
        (12, 20, 5, ("block size",)),  # 5 * 12 = 60 of 64 warps; a sixth block would need 72
        (1, 16, 32, ("blocks",)),  # 32 blocks are the most
        (2, 16, 32, ()),
    ],
)
@pytest.mark.parametrize("target", [80, 90, 100])
def test_registers_and_warps(target, warps, registers, blocks, held):
    found = occupancy(target, warps, registers, 0)
    assert found == (blocks, blocks * warps, blocks * warps / 64, held)


@pytest.mark.parametrize(
    ("target", "shared", "blocks"),
    [
        (80, 40 * KIB, 4),  # 41 KiB with what the driver keeps; 164 / 41
        (90, 40 * KIB, 5),  # 228 / 41 = 5.6
        (80, 40 * KIB + 1, 3),  # 128 bytes more: 164 / 41.125 = 3.99
        (80, 163 * KIB, 1),
        (80, 163 * KIB + 1, 0),
        (90, 227 * KIB, 1),
        (100, 227 * KIB + 1, 0),
        (100, 113 * KIB, 2),  # 228 / 114
        (100, 113 * KIB + 1, 1),
    ],
)
def test_shared_memory(target, shared, blocks):
    found = occupancy(target, 4, 32, shared)
    assert (found.blocks, found.held) == (blocks, ("shared memory",))


def test_tensor_memory():
    assert occupancy(100, 4, 32, 0, 128)[::3] == (4, ("tensor memory",))
    assert occupancy(100, 4, 32, 0, 512).blocks == 1
    assert occupancy(100, 4, 32, 40 * KIB, 64)[::3] == (5, ("shared memory",))  # eight by tensor memory


def test_two_limits_at_once():
    assert occupancy(80, 4, 128, 40 * KIB) == (4, 16, 0.25, ("registers", "shared memory"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((86, 4, 32, 0), "limits of sm_86 are not known"),
        ((80, 0, 32, 0), "1 to 32 warps, not 0"),
        ((80, 33, 32, 0), "1 to 32 warps, not 33"),
        ((80, 4, -1, 0), "negative"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        occupancy(*arguments)
