"""The token-op suite at toy size: every variant runs and is checked, its JSON is well formed. No time is judged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types

import pytest
import torch

pytest.importorskip("rich")

from maefast.bench import environment, machine, results, timing
from maefast.bench.micro import __main__ as micro
from maefast.bench.micro import attention_peers, bench_attention, suite, tables
from maefast.bench.micro.op import BOTH, FORWARD, Case, Op, Peer
from maefast.bench.micro.shapes import PRESETS, TOY, VIDEOMAE_B, VIT_B
from tests.bench.common import LIMITS

CASES = list(suite.cases(suite.FAMILIES, PRESETS["toy"]["cpu"], [torch.float32, torch.bfloat16], "cpu"))


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Two sets of inputs, not as many as fill a cache: in bfloat16 some of torch's convolutions take long on processors
    that lack the instructions. And the machine's limits are not what is tested here."""
    monkeypatch.setattr(environment, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(machine, "measure", lambda device: LIMITS)


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
        "linear",
        "add_norm",
        "bias_gelu",
        "adamw",
        "patch_loss",
        "farthest_points",
        "knn",
        "chamfer",
        "feature_loss",
        "resize",
        "pack_cells",
        "unpack_cells",
        "max_pool_cells",
        "avg_pool_cells",
        "global_pool_cells",
        "conv_cells",
        "conv_transpose_cells",
        "depthwise_cells",
        "batch_norm_act",
        "grn",
    }
    assert {case.direction for case in CASES} == {FORWARD, BOTH}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    records, samples = suite.run(case, ("eager", "tuned"), rounds=2, limits=LIMITS, warmup=0)
    by_name = {record["variant"]: record for record in records}
    # The peers must agree with one another, too: a faulty peer is as misleading as a faulty kernel.
    ours = "maefast-reference" if case.op.raw else "maefast"
    for name in ("eager", "tuned", ours):
        assert "error" not in by_name[name], by_name[name]
        assert len(samples[name]) == 2
    for record in records:
        assert "WRONG" not in record.get("error", ""), record
    assert set(by_name[ours]["ratios"]) == {"eager", "tuned"}
    assert sum(record.get("default", False) for record in records) == 1


ATTENTION = [case for case in CASES if case.op.more and case.op.name.startswith("attention")]


def test_attention_is_measured_where_the_targets_are():
    """The lengths, head widths and batches of the aims, and a ragged batch of the same rows."""
    found = set()
    for case in suite.cases(["attention"], PRESETS["full"]["cpu"], [torch.float32], "cpu"):
        made = case.op.make(case.shape, case.dtype, torch.Generator())
        if "lengths" in made:
            assert sum(made["lengths"]) == len(made["qkv"]) == case.shape.batch * (case.shape.prefix + case.shape.keep)
            assert len(set(made["lengths"])) > 1
        found.add(tuple(made["qkv"].shape))
    for batch, length, heads, width in ((16, 50, 12, 64), (16, 197, 16, 32), (128, 26, 6, 64), (256, 10, 12, 64)):
        assert (batch, length, 3, heads, width) in found
    assert (16 * 50, 3, 12, 64) in found


def test_the_automatic_choice_is_timed_where_libraries_may_serve():
    op = suite.ops("attention")[0]
    case = Case(op, TOY, torch.bfloat16, FORWARD, "cuda")
    names = suite.variants(case, ("eager", "library"))
    assert names["maefast"] is None
    assert {"maefast-cuda", "maefast-triton", "maefast-reference", "varlen", "sdpa_cudnn"} < names.keys()
    assert suite.default_variant(case) == "maefast"
    assert "maefast" not in suite.variants(Case(op, TOY, torch.bfloat16, FORWARD, "cpu"), ("eager",))


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_further_peers_agree_or_say_why_not(case):
    records, samples = suite.run(case, ("eager", "library"), rounds=1, warmup=0)
    errors = {r["variant"]: r["error"] for r in records if "error" in r and not r["variant"].startswith("maefast")}
    timed = {"jagged"} if "jagged" in case.op.more else {"sdpa_flash", "sdpa_math"}
    assert samples.keys() >= timed
    assert errors.keys() == case.op.more.keys() - timed - {"flex"}
    assert errors["varlen"] == "CUDA only"
    assert "WRONG" not in " ".join(errors.values())
    ours = next(r for r in records if r["variant"] == "maefast-reference")
    assert set(ours["ratios"]) == {"eager", *timed}


@pytest.mark.parametrize("case", [case for case in CASES if case.op.name == "adamw"], ids=str)
def test_forms_of_adamw_agree(case):
    records, samples = suite.run(case, ("eager", "tuned", "library"), rounds=1, warmup=0)
    assert {"eager", "tuned", "foreach", "maefast-reference"} <= samples.keys()
    assert not [r for r in records if "error" in r and r["variant"] != "maefast-cpu"], records


@pytest.mark.parametrize("op", [op for op in suite.ops("attention") if op.more], ids=lambda op: op.name)
def test_flex_agrees(op, monkeypatch):
    """Uncompiled: what is compiled is torch's own function."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_peers, "_flex", lambda: flex_attention)
    for direction in op.directions:
        case = Case(op, TOY, torch.float32, direction, "cpu")
        records, _ = suite.run(case, ("eager", "compile_library"), rounds=1, warmup=0)
        record = next(r for r in records if r["variant"] == "flex")
        if direction == BOTH:
            assert record["error"] == "on a CPU FlexAttention has no backward"
        else:
            assert record["median_s"] > 0


@pytest.mark.parametrize("op", [op for op in suite.ops("attention") if op.more], ids=lambda op: op.name)
def test_packed_peers_agree(op, monkeypatch):
    """varlen and xformers, which a CPU lacks, on stand-ins: what they are called with means the same attention."""

    def attend(q, k, v, counts):
        samples = zip(*(t.transpose(0, 1)[None].split(counts, dim=2) for t in (q, k, v)), strict=True)
        parts = [torch.nn.functional.scaled_dot_product_attention(*sample) for sample in samples]
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        counts = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(counts)
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert cu_seq_q.dtype is torch.int32
        return attend(query, key, value, counts)

    class Mask:
        from_seqlens = staticmethod(list)

    def memory_efficient_attention(query, key, value, attn_bias=None):
        if attn_bias is None:
            return torch.stack([attend(*sample, [query.shape[1]]) for sample in zip(query, key, value, strict=True)])
        return attend(query[0], key[0], value[0], attn_bias)[None]

    torch_side = types.SimpleNamespace(varlen_attn=varlen_attn)
    xformers_side = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", torch_side)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers_side)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", types.ModuleType("xformers.ops.fmha"))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", types.SimpleNamespace(BlockDiagonalMask=Mask))
    more = {name: Peer(op.more[name].run) for name in ("varlen", "xformers")}
    for direction in op.directions:
        case = Case(Op(**{**vars(op), "more": more}), TOY, torch.float32, direction, "cpu")
        _, samples = suite.run(case, ("eager", "library"), rounds=1, warmup=0)
        assert samples.keys() >= more.keys()


def test_a_wrong_further_peer_is_refused():
    op = suite.ops("attention")[0]
    wrong = Peer(lambda inputs: bench_attention.eager(inputs) * 1.01)
    case = Case(Op(**{**vars(op), "more": {"wrong": wrong}}), TOY, torch.float32, FORWARD, "cpu")
    records, samples = suite.run(case, ("eager", "library"), rounds=1, warmup=0)
    assert "WRONG RESULT" in next(r for r in records if r["variant"] == "wrong")["error"]
    assert "wrong" not in samples


def test_no_compile_leaves_compiled_peers_out(monkeypatch):
    asked = []
    measure = micro.measure

    def note(device, preset, families, dtypes, peers, *rest, **more):
        asked.append(peers)
        return measure("cpu", "toy", ("mask",), (torch.float32,), ("eager",), rounds=1)

    monkeypatch.setattr(micro, "measure", note)
    assert micro.main(["--preset", "full", "--no-compile"]) == 0
    assert asked == [("eager", "tuned", "library")]


def test_linear_through_onednn(monkeypatch):
    """Large enough for the library that the toy shape does not reach."""
    module = sys.modules["maefast.ops.linear"]
    if not module._has_onednn():
        pytest.skip("this torch has no private oneDNN linear")
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_choice", ("onednn", "test"))
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(args) or product(*args))
    shape = suite.Shape("linear", 8, (32, 32), (8, 8), 15, width=128, decoder_width=128)
    for case in suite.cases(["linear"], [shape], [torch.float32, torch.bfloat16], "cpu"):
        calls.clear()
        records, _ = suite.run(case, ("eager",), rounds=1, warmup=0)
        assert calls
        assert [r["variant"] for r in records if "error" not in r] == ["eager", "maefast"]
    assert not list(suite.cases(["linear"], [shape], [torch.float32], "cuda"))
    doc = micro.measure("cpu", "toy", ("linear",), (torch.float32,), ("eager",), rounds=1)
    assert doc["settings"]["linear_library"] == "onednn"


def test_video_shape_agrees():
    shape = suite.Shape("video", 2, (4, 16, 16), (2, 8, 8), 3, 32, 16, prefix=0, norm="videomae")
    for case in suite.cases(suite.FAMILIES, [shape], [torch.float32], "cpu"):
        records, _ = suite.run(case, ("eager", "tuned"), rounds=1, warmup=0)
        assert not [r for r in records if "error" in r and r["variant"] != "maefast-cpu"], records


def test_a_wrong_result_is_refused():
    op = next(op for op in suite.ops("embed") if op.name == "gather_tokens")
    wrong = Op(**{**vars(op), "ours": lambda inputs, backend: op.ours(inputs, backend) * 1.01})
    case = Case(wrong, TOY, torch.float32, FORWARD, "cpu")
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

    case = Case(Op(**{**vars(op), "ours": ours}), TOY, torch.float32, BOTH, "cpu")
    records, _ = suite.run(case, ("eager",), rounds=1)
    assert "grad" in next(r for r in records if r["variant"] == "maefast-reference")["error"]


def test_document_and_table(tmp_path, capsys):
    path = tmp_path / "deep" / "micro.json"
    assert micro.main(["--preset", "toy", "--family", "restore", "--peers", "eager", "--json", str(path)]) == 0
    doc = results.read(path)
    assert doc["kind"] == "micro"
    assert doc["environment"]["torch"] == torch.__version__
    assert doc["environment"]["kind"] == "cpu"
    assert doc["settings"]["machine"]["copy_gb_s"] > 0
    assert doc["records"]
    out = capsys.readouterr().out
    assert "restore_tokens" in out
    assert "vs eager" in out


def slow(op: Op, seconds: float) -> Op:
    """An op of which each call sleeps."""

    def wait(call):
        return lambda *given: time.sleep(seconds) or call(*given)

    return Op(**{**vars(op), "eager": wait(op.eager), "tuned": wait(op.tuned), "ours": wait(op.ours)})


def test_a_slow_case_ends(monkeypatch):
    """By time, after as many rounds of all variants; its warm-up does not go through all sets of inputs."""
    monkeypatch.setattr(environment, "cache_bytes", lambda device: 2**40)
    monkeypatch.setattr(suite, "SLOW", 5e-3)
    (op,) = suite.ops("mask")
    case = Case(slow(op, 6e-3), TOY, torch.float32, FORWARD, "cpu")
    records, samples = suite.run(case, ("eager", "tuned"), rounds=1000, warmup=0, seconds=0.01, least=2)
    assert len({len(rounds) for rounds in samples.values()}) == 1
    assert {len(rounds) for rounds in samples.values()} == {2}
    timed = [record for record in records if "error" not in record]
    assert all((r["rounds"], r["input_sets"], r["calls_a_round"]) == (2, 2, 1) for r in timed)
    assert min(r["median_s"] for r in timed) >= 6e-3


def test_a_fast_case_has_all_its_rounds():
    (op,) = suite.ops("mask")
    records, _ = suite.run(Case(op, TOY, torch.float32, FORWARD, "cpu"), ("eager",), rounds=7, warmup=0, seconds=60.0)
    assert {r["rounds"] for r in records if "error" not in r} == {7}


def test_the_bound_is_in_the_settings(tmp_path, monkeypatch):
    """A typed number of rounds is kept; a typed bound is, too."""
    asked = []
    measure = micro.measure

    def note(*given, **more):
        asked.append(given[5:8])
        return measure("cpu", "toy", ("mask",), (torch.float32,), ("eager",), *given[5:8], **more)

    monkeypatch.setattr(micro, "measure", note)
    for typed in ([], ["--rounds", "2"], ["--rounds", "2", "--seconds-a-case", "1.5"]):
        assert micro.main(["--preset", "toy", *typed, "--json", str(tmp_path / "x.json")]) == 0
    assert asked == [(3, None, 4.0), (2, None, None), (2, None, 1.5)]
    settings = results.read(tmp_path / "x.json")["settings"]
    assert (settings["seconds_a_case"], settings["least_rounds"], settings["cases_left_out"]) == (1.5, 3, 0)
    assert "at least 3, where they took over 1.5 s" in tables.rounds(settings)
    assert tables.rounds({"rounds": 3}) == "Medians of 3 rounds."


ARGUMENTS = ["--preset", "toy", "--family", "embed", "--dtype", "float32", "--peers", "eager", "--rounds", "1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stopped_run_leaves_what_it_measured(tmp_path, monkeypatch, error):
    """Out of the middle of a case."""
    path, real, done = tmp_path / "micro.json", suite.run, []

    def stopped(case, *given, **more):
        if len(done) == 2:
            raise error
        done.append(str(case))
        return real(case, *given, **more)

    monkeypatch.setattr(suite, "run", stopped)
    if error is KeyboardInterrupt:
        assert micro.main([*ARGUMENTS, "--json", str(path)]) == 130
    else:
        with pytest.raises(SystemExit):
            micro.main([*ARGUMENTS, "--json", str(path)])
    doc = results.read(path)
    cases = {tables.key(record) for record in doc["records"]}
    assert len(cases) == len(done) == 2
    everything = list(suite.cases(["embed"], PRESETS["toy"]["cpu"], [torch.float32], "cpu"))
    assert doc["settings"]["cases_left_out"] == len(everything) - 2 > 0
    assert "were left out" in tables.left_out(doc)
    assert [p.name for p in tmp_path.iterdir()] == ["micro.json"]


def test_a_killed_process_leaves_what_it_measured(tmp_path):
    """By the signal that nothing can catch, as soon as the first case is there."""
    path = tmp_path / "micro.json"
    code = f"""
from maefast.bench import environment, machine
from maefast.bench.micro import suite
environment.cache_bytes = lambda device: 1
machine.measure = lambda device: {LIMITS!r}
real, done = suite.run, []
def run(case, *given, **more):
    if len(done) == 2:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(case)
    return real(case, *given, **more)
suite.run = run
from maefast.bench.micro.__main__ import main
main({[*ARGUMENTS, "--json", str(path)]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    doc = results.read(path)
    assert len({tables.key(record) for record in doc["records"]}) == 2
    assert doc["settings"]["cases_left_out"] > 0


def test_quick_and_preset_are_one_choice(capsys):
    with pytest.raises(SystemExit):
        micro.main(["--quick", "--preset", "full"])
    assert "not allowed with" in capsys.readouterr().err


def test_budget_leaves_cases_out():
    with pytest.raises(ValueError, match="no records"):
        micro.measure("cpu", "toy", budget=-1.0)


def test_a_broken_case_does_not_lose_the_others(monkeypatch):
    def broken(case, *args, **more):
        if case.op.name == "patch_embed":
            raise RuntimeError("device on fire")
        return real(case, *args, **more)

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
    """The CUDA-graph clock captures every kernel: nothing on this path waits for the device."""
    records, _ = suite.run(case, ("eager", "tuned"), rounds=2, limits=LIMITS, warmup=0)
    for record in records:
        assert "WRONG" not in record.get("error", ""), record
        if record["variant"] in ("maefast-triton", "maefast-cuda"):
            assert "note" not in record, record
    torch.randn(1, device="cuda")  # no capture has left the default generator behind


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


def test_check_times_nothing_and_finds_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(timing, "sampler", lambda *what: pytest.fail("timed"))
    arguments = ["--preset", "toy", "--family", "restore", "--peers", "eager", "tuned", "--check"]
    assert micro.main(arguments) == 0
    assert "4 cases compared, 0 variants wrong" in capsys.readouterr().out
    (op,) = suite.ops("restore")
    wrong = Op(**{**vars(op), "tuned": lambda inputs: op.tuned(inputs) * 1.1})
    monkeypatch.setattr(suite, "ops", lambda family: [wrong])
    assert micro.main(arguments) == results.WRONG
    assert "restore_tokens float32 forward, tuned: WRONG RESULT" in capsys.readouterr().out


def test_a_peer_that_rounds_does_not_condemn_a_better_result():
    """Judged in float64 where the two differ; what is farther from that than twice the peer is still wrong."""
    (op,) = suite.ops("restore")

    def off(by: float):
        return lambda inputs: op.eager(inputs) * (1.0 if inputs["x"].dtype is torch.float64 else 1.0 + by)

    for direction in op.directions:
        case = Case(Op(**{**vars(op), "eager": off(1e-4), "tuned": off(3e-4)}), TOY, torch.float32, direction, "cpu")
        records = suite.check(case, ("eager", "tuned"))
        assert [record["variant"] for record in records] == ["tuned"], records
        assert "relative error 2.0e-04" in records[0]["error"]
