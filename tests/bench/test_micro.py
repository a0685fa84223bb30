"""The token-op suite at toy size: every variant runs and is checked, its JSON is well formed. No time is judged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")

from bench import environment, results, timing
from bench.micro import __main__ as micro
from bench.micro import suite, tables
from bench.micro.shapes import PRESETS, TOY, VIDEOMAE_B, VIT_B

CASES = list(suite.cases(suite.FAMILIES, PRESETS["toy"]["cpu"], [torch.float32, torch.bfloat16], "cpu"))


def test_shapes_are_those_of_the_papers():
    assert (VIT_B.tokens, VIT_B.keep, VIT_B.masked, VIT_B.values) == (196, 49, 147, 768)
    assert (VIDEOMAE_B.tokens, VIDEOMAE_B.keep, VIDEOMAE_B.values) == (1568, 160, 1536)


def test_every_public_token_op_is_there():
    assert {case.op.name.split(" (")[0] for case in CASES} == {
        "token_mask",
        "patch_embed",
        "gather_tokens",
        "restore_tokens",
        "attention",
        "add_norm",
        "bias_gelu",
        "patch_loss",
    }
    assert {case.direction for case in CASES} == {suite.FORWARD, suite.BOTH}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    records, samples = suite.run(case, ("eager", "tuned"), rounds=2, bandwidth=1e9, warmup=0)
    by_name = {record["variant"]: record for record in records}
    # The peers must agree with one another, too: a faulty peer is as misleading as a faulty kernel.
    for name in ("eager", "tuned", "maefast-reference"):
        assert "error" not in by_name[name], by_name[name]
        assert len(samples[name]) == 2
    for record in records:
        assert "WRONG" not in record.get("error", ""), record
    assert set(by_name["maefast-reference"]["ratios"]) == {"eager", "tuned"}


def test_video_shape_agrees():
    shape = suite.Shape("video", 2, (4, 16, 16), (2, 8, 8), 3, 32, 16, prefix=0, norm="videomae")
    for case in suite.cases(suite.FAMILIES, [shape], [torch.float32], "cpu"):
        records, _ = suite.run(case, ("eager", "tuned"), rounds=1, warmup=0)
        assert not [r for r in records if "error" in r and r["variant"] != "maefast-cpu"]


def test_a_wrong_result_is_refused():
    op = next(op for op in suite.ops("embed") if op.name == "gather_tokens")
    wrong = suite.Op(**{**vars(op), "ours": lambda inputs, backend: op.ours(inputs, backend) * 1.01})
    case = suite.Case(wrong, TOY, torch.float32, suite.FORWARD, "cpu")
    records, samples = suite.run(case, ("eager",), rounds=1, warmup=0)
    record = next(r for r in records if r["variant"] == "maefast-reference")
    assert "WRONG RESULT" in record["error"]
    assert "median_s" not in record
    assert "maefast-reference" not in samples


def test_a_wrong_gradient_is_refused():
    op = next(op for op in suite.ops("embed") if op.name == "gather_tokens")

    def ours(inputs, backend):
        out = op.ours(inputs, backend)
        return out.detach() + (out - out.detach()) * 2

    case = suite.Case(suite.Op(**{**vars(op), "ours": ours}), TOY, torch.float32, suite.BOTH, "cpu")
    records, _ = suite.run(case, ("eager",), rounds=1)
    assert "grad" in next(r for r in records if r["variant"] == "maefast-reference")["error"]


def test_document_and_table(tmp_path, capsys):
    path = tmp_path / "deep" / "micro.json"
    assert micro.main(["--preset", "toy", "--family", "restore", "--peers", "eager", "--json", str(path)]) == 0
    doc = results.read(path)
    assert doc["kind"] == "micro"
    assert doc["environment"]["torch"] == torch.__version__
    assert doc["environment"]["kind"] == "cpu"
    assert doc["settings"]["copy_gb_s"] > 0
    assert doc["records"]
    out = capsys.readouterr().out
    assert "restore_tokens" in out
    assert "vs eager" in out


def test_budget_leaves_cases_out():
    with pytest.raises(ValueError, match="no records"):
        micro.measure("cpu", "toy", budget=-1.0)


def test_a_broken_case_does_not_lose_the_others(monkeypatch):
    def broken(case, *args):
        if case.op.name == "patch_embed":
            raise RuntimeError("device on fire")
        return real(case, *args)

    real = suite.run
    monkeypatch.setattr(suite, "run", broken)
    doc = micro.measure("cpu", "toy", ("embed",), (torch.float32,), ("eager",), rounds=1)
    assert any("median_s" in r for r in doc["records"])
    assert "device on fire" in " ".join(tables.failures(doc))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(capsys):
    assert micro.main(["--device", "cuda"]) == 3
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(suite.cases(suite.FAMILIES, [TOY], [torch.float32], "cuda")), ids=str)
def test_case_on_a_gpu(case):
    """The CUDA-graph clock captures every variant: nothing on this path waits for the device."""
    records, _ = suite.run(case, ("eager", "tuned"), rounds=2, bandwidth=1e9, warmup=0)
    for record in records:
        assert "WRONG" not in record.get("error", ""), record
        if record["variant"].startswith("maefast-"):
            assert "note" not in record, record


def test_pytest_benchmark_form():
    pytest.importorskip("pytest_benchmark")
    # An xdist worker's variables, inherited, would switch the benchmarks of the inner run off.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/micro", "--preset", "toy", "--rounds", "2", "-k", "token_mask", "-q"],
        cwd=environment.ROOT,
        env={**outer, "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "token_mask-toy-b2-float32-forward-tuned" in done.stdout
    assert "failed" not in done.stdout


def test_ratio_pairs_the_rounds():
    # The machine slows threefold half-way: the paired ratio does not see it.
    assert timing.ratio([2.0, 6.0, 6.0], [1.0, 3.0, 3.0]) == pytest.approx(2.0)
    assert timing.quartiles([3.0]) == (3.0, 3.0)


def test_interleave_runs_all_in_each_round():
    calls: list[str] = []
    clocks = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    samples = timing.interleave(clocks, 4)
    assert all(len(s) == 4 for s in samples.values())
    for i in range(4):
        assert set(calls[3 * i : 3 * i + 3]) == set("abc")
