"""`maefast doctor`: complete, honest about this machine, readable and JSON."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import maefast
from maefast import _native, doctor, ops
from maefast.ops import _attention_table, _conv_table, _dispatch


@pytest.fixture(scope="module")
def info() -> doctor.Info:
    return doctor.collect()


def text(info: doctor.Info) -> str:
    from rich.console import Console

    stream = io.StringIO()
    doctor.render(info, Console(file=stream, width=200))
    return stream.getvalue()


def test_versions_and_devices(info):
    versions = info["versions"]
    assert versions["maefast"] == maefast.__version__
    assert versions["torch"] == torch.__version__
    assert versions["python"] == platform.python_version()
    assert versions["CUDA of torch"] == torch.version.cuda
    assert len(info["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert 1 <= info["cpu"]["usable"] <= info["cpu"]["threads"]
    assert info["cpu"]["torch_threads"] == torch.get_num_threads()


def test_every_op_has_a_backend_and_a_reason(info):
    cpu = {row["op"]: row for row in info["ops"] if row["device"] == "cpu"}
    assert set(cpu) == {*_dispatch.PUBLIC_OPS, "attention", "conv_cells", "linear"}
    for op in _dispatch.PUBLIC_OPS:
        assert (cpu[op]["backend"], cpu[op]["reason"]) == _dispatch.why(op, "cpu")
    assert all(row["reason"] for row in info["ops"])


def test_attention_convolution_and_linear_show_their_tables(info):
    for op, table in (("attention", _attention_table), ("conv_cells", _conv_table)):
        shown = [(row["backend"], row["reason"]) for row in info["ops"] if row["op"] == op]
        assert shown[: len(table.why("cpu"))] == table.why("cpu")
    assert [row["backend"] for row in info["ops"] if row["op"] == "linear"] == [ops.linear_library()[0]]


def test_evidence_of_gpu_kernels_shows(monkeypatch):
    monkeypatch.setattr(_dispatch, "CUDA_EVIDENCE", {})
    monkeypatch.setattr(_dispatch, "TRITON_EVIDENCE", {})
    empty = doctor.collect()
    assert empty["evidence"] == []
    assert "passed their tests on a device: none yet" in text(empty)
    found = _dispatch.Evidence("NVIDIA Test", "0123456789ab", "2026-01-02", 1.5)
    monkeypatch.setattr(_dispatch, "CUDA_EVIDENCE", {"attention": found})
    info = doctor.collect()
    assert info["evidence"] == [{"kernel": "CUDA C++", "op": "attention", **found._asdict()}]
    shown = text(info)
    for part in ("CUDA C++", "NVIDIA Test", "0123456789ab", "2026-01-02"):
        assert part in shown


def test_a_forced_backend_shows():
    with maefast.backend("reference"):
        rows = doctor.collect()["ops"]
    rows = [row for row in rows if row["op"] != "linear"]  # has libraries of its own, and a variable to force one
    assert {row["backend"] for row in rows} == {"reference"}
    assert all("forced" in row["reason"] for row in rows)


def test_table_says_what_the_data_says(info):
    shown = text(info)
    for row in info["ops"]:
        assert row["op"] in shown
    for expected in (torch.__version__, info["cpu"]["name"], "Versions", "Devices", "Native libraries"):
        assert expected in shown
    for warning in info["warnings"]:
        assert warning in shown.replace("\n", " ")


def test_json_round_trips(capsys, info):
    doctor.report(as_json=True)
    assert set(json.loads(capsys.readouterr().out)) == set(info)


def test_libraries_of_a_lesser_machine_are_told(monkeypatch, info):
    """Built for what another machine had, or with MAEFAST_ISAS, they serve; the doctor says what that costs."""
    monkeypatch.setattr(_native, "has_cpu_ops", True)
    cpu = {**info["cpu"], "isa": "avx2", "best_isa": "avx2", "machine_isa": "avx512bf16"}
    built = {**info, "cpu": cpu, "build": {**info["build"], "cpu_isas": "plain avx2"}}
    told = [line for line in doctor._warnings(built) if "MAEFAST_ISAS=all" in line]
    assert len(told) == 1
    assert "this CPU has avx512bf16, and the CPU kernels were built for plain avx2" in told[0]
    built["cpu"] = {**cpu, "machine_isa": "avx2"}
    assert not [line for line in doctor._warnings(built) if "MAEFAST_ISAS=all" in line]


def test_warnings_name_the_trouble_and_the_cure(monkeypatch, info):
    monkeypatch.setattr(_native, "build_failure", lambda: "no compiler was found")
    broken = {
        **info,
        "native": {"C": False, "cpu": False, "cuda": False, "error": "_cpu.so is not installed", "cuda_note": None},
        "cpu": {**info["cpu"], "torch_threads": 64, "usable": 2},
    }
    found = "\n".join(doctor._warnings(broken))
    for part in (
        "_cpu.so is not installed",
        "no compiler was found",
        "64 threads on 2 usable CPUs",
        "OMP_NUM_THREADS=2",
    ):
        assert part in found


@pytest.mark.parametrize("has", [True, False])
def test_warns_of_bfloat16_where_it_is_emulated(info, has):
    machine = {**info, "cpu": {**info["cpu"], "features": {"avx512bf16": has}}}
    assert any("bfloat16" in warning for warning in doctor._warnings(machine)) is not has


def test_warnings_about_a_gpu(monkeypatch, info):
    gpu = {"name": "GPU of the test", "capability": "75", "memory_gib": 1.0, "multiprocessors": 1}
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: 12)
    machine = {
        **info,
        "gpus": [gpu],
        "native": {**info["native"], "cuda": True},
        "build": {"cuda": "13.0.88", "cuda_archs": "80-real 100-virtual"},
        "versions": {**info["versions"], "triton": None},
    }
    found = "\n".join(doctor._warnings(machine))
    for part in ("no code for GPU of the test (sm_75)", "the driver supports CUDA 12", "Triton is not installed"):
        assert part in found
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: 13)
    assert "the driver supports" not in "\n".join(doctor._warnings(machine))


@pytest.mark.skipif(not _dispatch.HAS_TRITON, reason="Triton is not installed")
def test_kernels_that_no_gpu_has_run_are_named(monkeypatch, info):
    """Until there is evidence, the doctor says of each op that it is served without any, and warns where it matters."""
    monkeypatch.setattr(_dispatch, "TRITON_EVIDENCE", {})
    backend, reason = _dispatch.why("restore_tokens", "cuda")
    assert backend == "triton"
    assert _dispatch.UNTESTED in reason
    assert {"restore_tokens", "attention", "patch_loss"} <= set(_dispatch.untested())
    gpu = {"name": "GPU of the test", "capability": "90", "memory_gib": 1.0, "multiprocessors": 1}
    warned = lambda gpus: [w for w in doctor._warnings({**info, "gpus": gpus}) if "never tested" in w]  # noqa: E731
    assert not warned([])
    assert "restore_tokens" in warned([gpu])[0]
    known = dict.fromkeys(_dispatch.CUDA_OPS | set(_dispatch._registry.SCHEMAS), "tested on a GPU of the test")
    monkeypatch.setattr(_dispatch, "TRITON_EVIDENCE", known)
    assert "tested on a GPU of the test" in _dispatch.why("restore_tokens", "cuda")[1]
    assert not warned([gpu])
    with maefast.backend("reference"):
        assert not _dispatch.untested()


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("80-real 90a-real 100-real 100-virtual", 80, True),
        ("80-real 90a-real 100-real 100-virtual", 89, True),
        ("80-real 90a-real 100-real 100-virtual", 90, True),
        ("80-real 90a-real 100-real 100-virtual", 103, True),
        ("80-real 90a-real 100-real 100-virtual", 120, True),
        ("80-real 90a-real 100-real 100-virtual", 75, False),
        ("90a-real", 80, False),
        ("90a", 100, False),
        ("80", 90, True),
        ("", 90, False),
    ],
)
def test_architectures_that_a_build_serves(archs, capability, serves):
    assert doctor._serves(archs, capability) is serves


def test_without_native_libraries_it_still_reports():
    env = {**os.environ, "MAEFAST_DISABLE_NATIVE": "1"}
    command = [sys.executable, "-m", "maefast.doctor", "--json"]
    result = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=True, timeout=300)
    info = json.loads(result.stdout)
    assert info["native"]["cpu"] is False
    served = {row["op"]: row["backend"] for row in info["ops"] if row["device"] == "cpu"}
    assert {served[op] for op in _dispatch.PUBLIC_OPS} == {"reference"}
    assert served["attention"] == "sdpa"
    assert any("MAEFAST_DISABLE_NATIVE" in warning for warning in info["warnings"])
    assert "switched off" in text(info)
