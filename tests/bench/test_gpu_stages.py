"""The stages of bench/gpu_check.sh in pieces: lines, the pool of processes, the order of tests, and what smoke runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("rich")

from maefast.bench.environment import ROOT
from maefast.bench.gpu import all_tests, cases, compare, lines, pool, smoke, trainings
from maefast.ops import _registry

# --- lines -----------------------------------------------------------------------------------------------------


def test_a_killed_run_loses_nothing(tmp_path, monkeypatch):
    path, copy = tmp_path / "out" / "lines.jsonl", tmp_path / "copy.jsonl"
    monkeypatch.setenv(lines.COPY, str(copy))
    output = lines.Lines(path, "smoke")
    output.plan(["a", "b", "c", "d"])
    output.write("a", "passed", seconds=0.5)
    output.write("b", "failed", error="x" * 2000)
    output.write("c", "cut", error="the stage's time was over")
    with open(path, "a") as file:
        file.write('{"stage": "smoke", "id": "d", "outco')  # killed while writing
    found = lines.read(path, tmp_path / "missing")
    assert [line["id"] for line in found] == ["plan", "a", "b", "c"]
    assert len(found[2]["error"]) <= lines.TAIL + 4
    assert lines.not_run(found) == {"smoke": ["c", "d"]}
    assert output.left(["a", "b", "c", "d"]) == ["b", "c", "d"]
    assert lines.read(copy) == found


def test_the_last_result_counts_and_other_code_does_not(tmp_path, monkeypatch):
    output = lines.Lines(tmp_path / "lines", "smoke")
    output.write("a", "failed", error="first")
    output.write("a", "again")
    assert lines.latest(lines.read(output.path))["smoke", "a"]["outcome"] == "failed"
    output.write("a", "passed")
    assert lines.latest(lines.read(output.path))["smoke", "a"]["outcome"] == "passed"
    assert output.left(["a"]) == []
    monkeypatch.setattr(lines, "tree", lambda: "another")
    assert output.left(["a"]) == ["a"]


def test_lines_of_several_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from maefast.bench.gpu import lines; out = lines.Lines(sys.argv[1], 'smoke')\n"
        "for i in range(50): out.write(f'{sys.argv[2]}-{i}', 'passed', error='y' * 300)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lines"), name], cwd=ROOT) for name in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert len({line["id"] for line in lines.read(tmp_path / "lines")}) == 100


# --- the pool --------------------------------------------------------------------------------------------------


def make(kind: str) -> pool.Work:
    def work(id: str) -> pool.Outcome:
        if id == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if id == "raises":
            raise ValueError("no such thing")
        if id == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if id == "sleeps":
            time.sleep(60)
        return {"outcome": "passed", "process": os.getpid(), "kind": kind}

    return work


def test_pool():
    """A job that fails, dies, loses its device or takes too long costs one result; the others run."""
    found: dict[str, pool.Outcome] = {}
    ids = ["a", "raises", "dies", "b", "lost", "sleeps", "c"]
    pool.run(ids, make, ("x",), lambda id, outcome: found.update({id: outcome}), 1, seconds=120, each=8)
    assert list(found) == ids
    outcomes = {id: outcome["outcome"] for id, outcome in found.items()}
    assert outcomes == {**dict.fromkeys("abc", "passed"), "raises": "failed", "dies": "crashed", "lost": "failed",
                        "sleeps": "timeout"}  # fmt: skip
    assert "no such thing" in found["raises"]["error"]
    assert len({found[id]["process"] for id in "abc"}) == 3  # a new process after each loss
    assert all("seconds" in outcome for outcome in found.values())


def broken(kind: str) -> pool.Work:
    raise ImportError("no kernels here")


def test_a_worker_that_cannot_start_ends_the_stage():
    found = []
    with pytest.raises(RuntimeError, match="no kernels here"):
        pool.run(["a", "b"], broken, ("x",), lambda *given: found.append(given), 1, seconds=60)
    assert not found


def test_the_time_of_a_stage_is_over():
    found: dict[str, pool.Outcome] = {}
    start = time.monotonic()
    pool.run(["sleeps", "a"], make, ("x",), lambda id, outcome: found.update({id: outcome}), 1, seconds=6, each=60)
    assert time.monotonic() - start < 30
    assert found["sleeps"]["outcome"] == "cut"
    assert "a" not in found


# --- all tests ---------------------------------------------------------------------------------------------------

TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(3))
def test_fine(i): pass
def test_bad(): assert 1 == 2
def test_dies(): os.kill(os.getpid(), 9)
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access")
@pytest.mark.skip(reason="no such thing")
def test_skipped(): pass
"""


def test_every_test_leaves_a_line(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(TESTS)
    path = tmp_path / "lines"
    arguments = ["--lines", str(path), "--processes", "1", "--marker", "not_gpu", str(tmp_path)]
    assert all_tests.main(arguments) == 1
    found = lines.latest(lines.read(path))
    outcomes = {id.partition("::")[2]: line["outcome"] for (_, id), line in found.items()}
    assert outcomes == {**{f"test_fine[{i}]": "passed" for i in range(3)}, "test_bad": "failed", "test_dies": "crashed",
                        "test_lost": "failed", "test_skipped": "skipped"}  # fmt: skip
    assert not lines.not_run(lines.read(path))
    errors = {id.partition("::")[2]: line.get("error", "") for (_, id), line in found.items()}
    assert "assert 1 == 2" in errors["test_bad"]
    assert "no such thing" in errors["test_skipped"]
    assert "5 passed" not in capsys.readouterr().out

    # A second call tries again what did not pass, and nothing else.
    before = len(lines.read(path))
    (tmp_path / "test_some.py").write_text(TESTS.replace("1 == 2", "2 == 2"))
    assert all_tests.main(arguments) == 1
    later = [line for line in lines.read(path)[before:] if line["outcome"] not in lines.MARKS]
    assert {line["id"].partition("::")[2]: line["outcome"] for line in later} == {
        "test_bad": "passed", "test_dies": "crashed", "test_lost": "failed"}  # fmt: skip


def test_order_of_the_tests():
    ids = [
        "tests/kernels/test_implicit_conv_kernels.py::test_a[bfloat16]",
        "tests/kernels/test_norm_kernels.py::test_a[float32]",
        "tests/kernels/test_norm_kernels.py::test_a[bfloat16]",
        "tests/kernels/test_norm_kernels.py::test_b[bfloat16]",
        "tests/kernels/test_gelu_kernels.py::test_a[bfloat16]",
        "tests/ops/cuda/test_attention.py::test_a[torch.bfloat16]",
    ]
    assert all_tests.order(ids) == [ids[5], ids[2], ids[4], ids[3], ids[1], ids[0]]


# --- smoke -------------------------------------------------------------------------------------------------------


def ran(kind: str, size: cases.Size) -> set[str]:
    every = [case for group in (*cases.COMMON, cases.cell_cases) for case in group(size)]
    return {op for case in every if kind in case.backends for op in case.raw}


@pytest.mark.parametrize("size", [cases.REAL, cases.TOY], ids=["device", "rehearsal"])
def test_smoke_runs_every_kernel(size):
    triton = {op for op in _registry.SCHEMAS if _registry.FAMILY_OF[op] not in _registry.CPU_ONLY}
    assert ran("triton", size) == triton
    cuda = set(re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "cuda" / "registration.cpp").read_text()))
    assert cuda <= ran("cuda", size)


def test_smoke_begins_with_what_most_need():
    ids = smoke.plan(rehearse=True)
    assert len(ids) == len(set(ids))
    place = lambda text: next(i for i, id in enumerate(ids) if text in id)  # noqa: E731
    places = [place(text) for text in ("token_mask", "add_norm", "attention", "train/vit_mae", "grn", "train/fcmae")]
    assert places == sorted(places)
    assert all("implicit" in id for id in ids[place("implicit") :])
    assert all(dtype in " ".join(ids) for dtype in ("bfloat16", "float32", "float16"))


def test_smoke_on_a_device_trains_in_both_formats():
    ids = smoke.plan(rehearse=False)
    assert {id for id in ids if id.startswith("train/")} == {
        f"train/{name}/{dtype}" for name in trainings.TASKS for dtype in ("float32", "bfloat16")
    }


def _scaled(backend, device, x, factor=1.0):
    return x * (factor if backend != "reference" else 1.0)


def test_emulated_bfloat16():
    """Results that are rounded once pass; more error than the format's does not."""
    x = {"x": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    found = compare.errors(lambda *a, **k: _scaled(*a, **k), x, "mine", "cpu", torch.bfloat16, emulate=True)
    assert set(found) == {"output 0", "gradient of x"}
    assert not compare.too_large(found, torch.bfloat16)
    found = compare.errors(
        lambda *a, **k: _scaled(*a, **k, factor=1.03), x, "mine", "cpu", torch.bfloat16, emulate=True
    )
    assert "output 0: relative error 0.0298" in compare.too_large(found, torch.bfloat16)
    assert "gradient of x" in compare.too_large(found, torch.bfloat16)


def test_what_is_never_written_is_an_error():
    found = compare.errors(
        lambda backend, device, x: x if backend == "reference" else x * torch.nan, {"x": torch.ones(2)}, "mine", "cpu",
        torch.float32,
    )  # fmt: skip
    assert compare.too_large(found, torch.float32)


@pytest.mark.parametrize("name", ["vit_mae", "spark"])
def test_training_agrees_and_a_wrong_gradient_does_not(name, monkeypatch):
    found = trainings.errors(name, "cpu", torch.float32, toy=True)
    assert not trainings.too_large(found, torch.float32)
    train = trainings.train

    def wrong(model, task, device, dtype):
        values = train(model, task, device, dtype)
        return values if dtype is torch.float64 else [values[0], values[1] * 1.01, values[2]]

    monkeypatch.setattr(trainings, "train", wrong)
    assert "gradient norm" in trainings.too_large(trainings.errors(name, "cpu", torch.float32, toy=True), torch.float32)


def test_smoke_writes_what_it_finds(tmp_path):
    """One kernel in the interpreter, in a process of its own, and again: nothing is left to do."""
    pytest.importorskip("triton")
    path = tmp_path / "lines"
    command = [sys.executable, "-m", "maefast.bench.gpu.smoke", "--rehearse", "--lines", str(path), "--processes", "1"]
    command += ["--only", "bias_gelu-no bias", "--seconds", "300"]
    for text in ("3 passed", "nothing left to do; 3 were done before"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert text in done.stdout
    found = lines.latest(lines.read(path))
    assert {id for _, id in found} == {f"triton/bias_gelu-no bias/{t}" for t in ("bfloat16", "float32", "float16")}
    for (_, id), line in found.items():
        assert line["ops"] == ["bias_gelu", "bias_gelu_backward"]
        assert line["emulated"] == ("bfloat16" in id)
        assert json.dumps(line["errors"])
    assert lines.environment(lines.read(path))["kind"] == "cpu"
