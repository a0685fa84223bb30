"""csrc/build/choice.py: what a build compiles, on which machine, and what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "csrc/build/choice.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")
ALL = ["plain", "avx2", "avx512", "avx512bf16", "amx"]
HASWELL = {"sse2", "avx", "avx2", "fma", "f16c"}
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ZEN4 = SKYLAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN4 | {"amx_tile", "amx_bf16", "amx_int8"}
NVCC = {75, 80, 86, 90, 100, 120}
EVERY = ("80-real", "90a-real", "100-real", "100-virtual")


@pytest.fixture(scope="module")
def choice():
    spec = importlib.util.spec_from_file_location("maefast_build_choice", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked", "compiles", "cpu", "expected"),
    [
        ("native", ALL, {"sse2"}, ["plain"]),
        ("native", ALL, {"avx2"}, ["plain"]),  # without FMA and F16C the AVX2 kernels do not run
        ("native", ALL, HASWELL, ["plain", "avx2"]),
        ("", ALL, SKYLAKE, ["plain", "avx2", "avx512"]),
        ("native", ALL, SKYLAKE - {"avx512vl"}, ["plain", "avx2"]),
        ("native", ALL, ZEN4, ALL[:4]),
        ("native", ALL, SAPPHIRE_RAPIDS, ALL),
        ("native", ALL[:3], ZEN4, ALL[:3]),  # an older compiler
        ("native", ["plain"], set(), ["plain"]),  # another processor
        ("native", ALL, None, ALL),  # a machine that does not say what it has
        ("all", ALL, HASWELL, ALL),
        ("avx2", ALL, set(), ["plain", "avx2"]),  # for another machine
        ("avx512bf16", ALL, HASWELL, ["plain", "avx512", "avx512bf16"]),  # its copies are of attention alone
        ("amx", ALL, HASWELL, ["plain", "avx512", "avx512bf16", "amx"]),  # the system may give no leave for tiles
        ("AVX2, avx512", ALL, HASWELL, ["plain", "avx2", "avx512"]),
    ],
)
def test_instruction_sets(choice, asked, compiles, cpu, expected):
    found, why = choice.choose_isas(asked, compiles, cpu)
    assert list(found) == expected
    assert why


@pytest.mark.parametrize(("asked", "part"), [("avx9", "no instruction set 'avx9'"), ("avx2", "compiler has no avx2")])
def test_bad_instruction_sets_are_refused(choice, asked, part):
    with pytest.raises(ValueError, match=part):
        choice.choose_isas(asked, ["plain"], HASWELL)


CASES = [
    # asked, archs, CUDA of torch, known to nvcc, GPUs -> architectures (None: not built), part of the reason
    ("auto", "native", None, NVCC, ["9.0"], None, "2.13.0 has no CUDA"),  # whatever compiler is there
    ("auto", "native", "13.0", None, ["9.0"], None, "no working CUDA compiler"),
    ("auto", "native", "13.0", NVCC, ["9.0"], ("90a-real",), "GPUs of this machine"),
    ("auto", "", "13.0", NVCC, ["8.0", "9.0", "8.0"], ("80-real", "90a-real"), "GPUs of this machine"),
    ("auto", "native", "13.0", NVCC, ["8.6"], ("86-real",), "GPUs of this machine"),
    ("auto", "native", "13.0", NVCC, ["12.1"], ("120-virtual",), "GPUs of this machine"),  # newer than nvcc
    ("auto", "native", "13.0", NVCC, ["7.5", "8.0"], ("80-real",), "GPUs of this machine"),
    ("auto", "native", "13.0", NVCC, ["7.5"], None, "older than sm_80"),
    ("on", "native", "13.0", NVCC, ["7.5"], EVERY, "every architecture"),
    ("auto", "native", "13.0", NVCC, [], EVERY, "no GPU to tell"),  # images are often built without one
    ("auto", "all", "13.0", NVCC, ["9.0"], EVERY, "every architecture"),
    ("on", "native", None, NVCC, [], EVERY, "every architecture"),
    ("on", "all", None, {80, 86, 90}, [], ("80-real", "90a-real", "90-virtual"), "every architecture"),
    ("auto", "90a; 100", "13.0", NVCC, ["8.0"], ("90a", "100"), "MAEFAST_CUDA_ARCHS"),
    ("off", "90a", "13.0", NVCC, ["9.0"], None, "MAEFAST_CUDA=off"),
]


@pytest.mark.parametrize(("asked", "archs", "cuda", "known", "gpus", "expected", "part"), CASES)
def test_cuda(choice, asked, archs, cuda, known, gpus, expected, part):
    found = choice.choose_cuda(asked, archs, "2.13.0", cuda, known, gpus)
    assert found.build is (expected is not None)
    assert found.archs == (expected or ())
    assert part in found.why


@pytest.mark.parametrize(
    ("asked", "known", "part"),
    [
        ("yes", NVCC, "choose auto, on or off"),
        ("on", None, "no working CUDA compiler"),
        ("on", {50, 75}, "none of sm_80"),
    ],
)
def test_impossible_cuda_is_refused(choice, asked, known, part):
    with pytest.raises(ValueError, match=part):
        choice.choose_cuda(asked, "native", "2.13.0", "13.0", known, [])


def test_driver_and_compiler_are_asked(choice, tmp_path, monkeypatch):
    """What nvidia-smi and nvcc print, by stand-ins of theirs; neither there: nothing known."""
    for name, printed in (("nvidia-smi", "9.0\\n8.6\\n[N/A]"), ("nvcc", "compute_80\\ncompute_90\\ncompute_90a")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\nprintf '{printed}\\n'\n")
        tool.chmod(0o755)
    assert choice.nvcc_archs(str(tmp_path / "nvcc")) == {80, 90}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert choice.gpus_here() == ["9.0", "8.6"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert choice.gpus_here() == []
    assert choice.nvcc_archs("nvcc") is None


def test_flags_of_this_cpu_are_read(choice):
    from maefast import _native

    if _native.C is None or not _native.C.cpu_features():
        pytest.skip("maefast._C, which asks the processor itself, is not built, or this is no x86")
    best = choice.choose_isas("native", ALL, choice.cpu_flags())[0][-1]
    assert best == _native.C.machine_isa()


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **env}, timeout=60)


def test_the_environment_wins_and_mistakes_are_told():
    found = run("cpu", "--isas=all", "--compiles=plain;avx2", MAEFAST_ISAS="plain")
    assert found.stdout.strip() == "plain|asked for by MAEFAST_ISAS"
    torch = ("--torch-version=2.13.0", "--torch-cuda=none")
    assert run("cuda", "--cuda=on", *torch, MAEFAST_CUDA="off").stdout.strip() == "off||MAEFAST_CUDA=off"
    assert run("cuda", *torch).stdout.startswith("off||torch 2.13.0 has no CUDA")
    wrong = run("cuda", "--cuda=on", *torch)
    assert (wrong.returncode, wrong.stderr.strip()) == (1, "MAEFAST_CUDA=on, but no working CUDA compiler was found")
