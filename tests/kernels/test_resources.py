"""The reader of machine code, on a text written by hand and on kernels compiled here; what spills is caught."""

from __future__ import annotations

import importlib.util
import struct
import sys

import pytest

from tests.kernels import resources
from tests.kernels.resources import Resources, load, read, wide_share
from tests.kernels.support import INTERPRET
from tests.kernels.variants import Variant, with_accesses

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function first_kernel:
  REG:255 STACK:24 SHARED:2048 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second_kernel:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!P0  LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/               @P1 LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LDS.128 R4, [R6] ;
        /*0070*/                   STL.64 [R1], R4 ;
        /*0080*/                   STL [R1+0x8], R6 ;
        /*0090*/                   LDL.LU R6, [R1+0x8] ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00b0*/                   STG.E.U8 desc[UR4][R2.64], R6 ;
        /*00c0*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*00d0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   LD.E.64 R4, [R2] ;
        /*0100*/                   ST.E.S16 [R2], R4 ;
"""


def elf(**sections: bytes) -> bytes:
    """A 64-bit ELF file with these sections; "__" stands for the dot of a name."""
    contents = {name.replace("__", "."): content for name, content in sections.items()}
    names, body, table = b"\0", b"", [bytes(64)]
    for name, content in [*contents.items(), ("names", None)]:
        place, names = len(names), names + name.encode() + b"\0"
        content = names if content is None else content
        table.append(struct.pack("<IIQQQQ24x", place, 1, 0, 0, 64 + len(body), len(content)))
        body += content
    return struct.pack("<40xQ10xHHH", 64 + len(body), 64, len(table), len(table) - 1) + body + b"".join(table)


@pytest.fixture
def tools(monkeypatch):
    """The texts above instead of what the tools print."""
    printed = {"cuobjdump": USAGE, "nvdisasm": CODE}
    monkeypatch.setattr(resources, "_run", lambda name, *_: printed[name])


@pytest.mark.parametrize(("more", "shared"), [({}, 2048), ({"__nv__shared__reserved__0": b""}, 1024)])
def test_reader(tools, more, shared):
    found = load(elf(**more, __text__first_kernel=bytes(0xF0), __text__second_kernel=bytes(0x20)))
    assert {name: code.resources for name, code in found.items()} == {
        "first_kernel": Resources(255, 24, shared),
        "second_kernel": Resources(16, 0, 0),
    }
    first, second = read(list(found.values()), "sm_90a")
    assert first == Resources(255, 24, shared, {2: 1, 16: 3}, {1: 1, 4: 1, 32: 1}, 4, 12, 1)
    assert second == Resources(16, 0, 0, {8: 1}, {2: 1}, 0, 0, 0)
    assert read([], "sm_90a") == []


def test_share_of_wide_accesses():
    assert wide_share({2: 1, 16: 3}) == 48 / 50
    assert wide_share({4: 5}) == 0
    assert wide_share({32: 1, 8: 4}) == 0.5
    assert wide_share({}) is None


def variant(**change) -> Variant:
    found = Resources(32, 0, 0, {16: 1}, {16: 1})._replace(**change)
    return Variant("norm", "some_kernel", "f32", 0, 90, 4, found=found)


def test_what_is_a_problem():
    assert variant().problem() == ""
    assert variant(stack=8).problem() == "spills: 8 bytes of local memory"
    assert variant(local_stores=4).problem() == "spills: 4 bytes of local memory"
    assert variant(local_loads=4).problem() == "spills: 4 bytes of local memory"
    assert variant(stack=8)._replace(case="f32 (large)").problem() == ""
    assert variant(shared=227 * 1024).problem() == ""
    assert variant(shared=227 * 1024 + 1).problem() == "232449 bytes of shared memory"
    assert variant()._replace(error="ValueError: no\nmore").problem() == "ValueError: no"


compiled = pytest.mark.skipif(
    INTERPRET or importlib.util.find_spec("triton") is None or resources.tools() is None,
    reason="needs Triton, not interpreted, and cuobjdump",
)

if not INTERPRET and importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def hungry_kernel(x, out, BLOCK: tl.constexpr):
        """Holds BLOCK / 32 values a thread at once: with one warp more than there are registers."""
        i = tl.arange(0, BLOCK)
        value = tl.load(x + i)
        tl.store(out + i, value - tl.sum(value))


def compile_hungry(block: int, target: int = 90, warps: int = 1) -> Variant:
    from tests.kernels.compile_all import DIVISIBLE, Launch, compile_one

    signature = {"x": "*fp32", "out": "*fp32", "BLOCK": "constexpr"}
    aligned = {(0,): DIVISIBLE, (1,): DIVISIBLE}
    options = {"num_warps": warps, "num_stages": 1}
    launch = Launch("f32", __name__, "hungry_kernel", signature, {"BLOCK": block}, aligned, options)
    return with_accesses([compile_one((0, launch, target))])[0]


@compiled
def test_a_kernel_that_spills_is_caught():
    made = compile_hungry(8192)
    assert made.error == ""
    assert made.found.stack > 0
    assert made.found.local_stores > 0
    assert made.found.local_loads > 0
    assert made.problem().startswith("spills: ")


@compiled
@pytest.mark.parametrize("target", [80, 90, 100])
def test_a_kernel_that_does_not(target):
    made = compile_hungry(512, target, warps=4)
    assert (made.error, made.problem(), made.found.spilled) == ("", "", 0)
    assert made.found.registers < 64
    assert (made.found.loads, made.found.stores) == ({16: 1}, {16: 1})  # 512 / 128 floats a thread
    assert made.found.shared == 0
    assert 0 < made.shared == made.dynamic <= 1024  # of the sum over four warps
    assert made.occupancy.share == 1


@compiled
def test_the_command_fails_on_a_spill(monkeypatch, capsys):
    from tests.kernels import compile_all, page

    monkeypatch.setattr(sys, "argv", ["compile_all"])
    monkeypatch.setattr(page, "update", lambda *_, **__: pytest.fail("no page of kernels that spill"))
    for spilling in (variant(stack=8), variant(local_stores=4)._replace(language="cuda")):
        result = [variant(), spilling]
        monkeypatch.setattr(compile_all, "run_all", lambda *_, result=result: result)
        assert compile_all.main() == 1
        assert "<-- spills" in capsys.readouterr().out


@compiled
def test_what_is_no_machine_code():
    with pytest.raises(RuntimeError, match="cuobjdump"):
        load(b"none")
