"""From the lines of a window to dispatch: evidence, the tables, the summary; on lines made by hand."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich")

from maefast import ops
from maefast.bench import results
from maefast.bench.gpu import lines, summary, tune
from maefast.ops import _attention_table, _conv_table, _dispatch, _dispatch_data
from tests.bench.common import ENVIRONMENT, SHAPE

MACHINE = {**ENVIRONMENT, "kind": "cuda", "device": "NVIDIA Test", "date": "2026-01-02 03:04 UTC"}
BEFORE = json.loads(_dispatch_data.PATH.read_text())
# As before any measurement, whatever the file holds by now.
EMPTY = {
    **BEFORE,
    "evidence": {"cuda": {}, "triton": {}},
    "attention": [rule for rule in BEFORE["attention"] if "measured on" not in rule["why"]],
    "conv": [
        *(rule for rule in BEFORE["conv"] if rule["device"] == "cpu"),
        {"device": "cuda", "route": "halo", "grouped": False, "smallest": 4, "why": "not measured"},
        {"device": "cuda", "route": "taps", "grouped": False, "smallest": 1, "why": "not measured"},
        {"device": "cuda", "route": "halo", "grouped": True, "smallest": 4, "why": "not measured"},
    ],
}
GATHER = ["gather_tokens", "gather_tokens_backward"]
CLOCK = {"low_s": 1e-6, "high_s": 1e-6, "rounds": 3}


def line(stage: str, id: str, outcome: str, **fields) -> lines.Line:
    return {"stage": stage, "id": id, "outcome": outcome, "tree": "this", **fields}


def machine(**changes) -> lines.Line:
    return line("smoke", "environment", "environment", environment={**MACHINE, **changes})


def evidence(kind: str = "cuda", ops=("attention", "attention_backward"), outcome="passed", test="passed") -> list:
    file = "tests/ops/cuda/test_attention.py" if kind == "cuda" else "tests/kernels/test_attention_kernels.py"
    return [
        machine(),
        line("smoke", "plan", "planned", ids=[f"{kind}/a/bfloat16", f"{kind}/a/float16"]),
        line("all-tests", "plan", "planned", ids=[f"{file}::test_a"]),
        line("smoke", f"{kind}/a/bfloat16", outcome, ops=list(ops), backend=kind),
        line("smoke", f"{kind}/a/float16", "passed", ops=list(ops), backend=kind),
        line("all-tests", f"{file}::test_a", test),
    ]


def timed(length: int, width: int = 64, packed: bool = False, batch: int = 256, **microseconds) -> list[lines.Line]:
    """A measured case of attention; the variants by their names with - as _."""
    name = f"attention/b{batch}/{length}/12x{width}{'/packed' if packed else ''}"
    what = {"batch": batch, "length": length, "heads": 12, "width": width, "packed": packed, "dtype": "bfloat16"}
    base = {"op": "attention", "shape": SHAPE, "dtype": "bfloat16", "direction": "forward+backward", **CLOCK}
    return [
        line("speed", f"{name}/{variant}", "measured", attention=what,
             record={**base, "variant": variant, "median_s": time * 1e-6,
                     **({"ratios": {"eager": 1.0}, "default": False} if variant.startswith("maefast") else {})})
        for variant, time in ((key.replace("_", "-"), value) for key, value in microseconds.items())
    ]  # fmt: skip


def apply(doc: dict, monkeypatch) -> None:
    """Dispatch as if the file held this document."""
    data = _dispatch_data.parse(json.loads(tune.text(doc)))
    monkeypatch.setattr(_dispatch, "CUDA_EVIDENCE", data.cuda)
    monkeypatch.setattr(_attention_table, "TABLE", data.attention)
    monkeypatch.setattr(_conv_table, "TABLE", data.conv)
    # As beside a GPU with everything built.
    monkeypatch.setattr(_dispatch, "CUDA_OPS", frozenset({"attention", "attention_backward", *GATHER}))
    monkeypatch.setattr(_dispatch, "HAS_TRITON", True)


def serves(length: int, width: int = 64, packed: bool = False, dtype=torch.bfloat16, **changes) -> str:
    base = {"cross": False, "causal": False, "extras": False, "device": "cuda"}
    call = {"dtype": dtype, "head_dim": width, "max_q": length, "max_k": length, "packed": packed, **base, **changes}
    return _attention_table.choose(_attention_table.Call(**call), None)


WINS = [
    *timed(17, eager=30, maefast_triton=20, maefast_cuda=10),
    *timed(50, eager=40, maefast_triton=30, maefast_cuda=20),
    *timed(197, eager=100, maefast_triton=90),
    *timed(257, eager=100, maefast_triton=150),
]


# --- evidence ----------------------------------------------------------------------------------------------------


def test_evidence_names_device_commit_and_date():
    doc = tune.data(evidence(), EMPTY)
    assert set(doc["evidence"]["cuda"]) == {"attention", "attention_backward"}
    found = _dispatch_data.parse(doc).cuda["attention"]
    assert (found.device, found.commit, found.date) == ("NVIDIA Test", "0123456789ab", "2026-01-02")
    assert doc["evidence"]["triton"] == {}
    assert set(tune.data(evidence("triton"), EMPTY)["evidence"]["triton"]) == {"attention", "attention_backward"}


@pytest.mark.parametrize(
    "found",
    [
        evidence(outcome="failed"),
        evidence(outcome="timeout"),
        evidence(test="failed"),
        evidence(test="crashed"),
        evidence(test="skipped"),
        evidence()[:-1],  # its tests did not run
        [*evidence()[:4], evidence()[-1]],  # float16 was not run
        [row for row in evidence() if row["stage"] != "smoke" or row["outcome"] == "environment"],
        [*evidence(), line("smoke", "cuda/a/bfloat16", "failed", ops=["attention"], backend="cuda")],
        [*evidence(), {**line("smoke", "x", "passed"), "tree": "changed since"}],
    ],
    ids=["smoke failed", "smoke timeout", "test failed", "test crashed", "test skipped", "tests not run",
         "a dtype not run", "no smoke", "failed later", "other code"],
)  # fmt: skip
def test_no_evidence_without_all_of_it(found):
    assert "attention" not in tune.data(found, EMPTY)["evidence"]["cuda"]


def test_a_failure_withdraws_evidence_and_nothing_else_does():
    doc = tune.data(evidence(), EMPTY)
    assert tune.data([machine()], doc)["evidence"] == doc["evidence"]
    after = tune.data(evidence(outcome="failed"), doc)
    assert after["evidence"]["cuda"] == {}
    assert any("withdrawn" in row for row in tune.report(doc, after))


def test_a_rehearsal_is_no_evidence():
    with pytest.raises(ValueError, match="no evidence"):
        tune.data([machine(kind="cpu"), *evidence()[1:]], EMPTY)


# --- dispatch ----------------------------------------------------------------------------------------------------


def test_without_evidence_dispatch_is_as_before(monkeypatch):
    """Packed 16-bit calls go to varlen_attn, dense ones to torch, the rest to Triton; convolutions as by EMPTY."""
    apply(EMPTY, monkeypatch)
    monkeypatch.setattr(_attention_table, "_varlen_attn", lambda: lambda q, k, v, cu_q, cu_k, max_q, max_k, scale: None)
    for length in (1, 17, 64, 197, 4096):
        for width in (32, 64):
            assert serves(length, width) == serves(length, width, dtype=torch.float32) == "sdpa"
            assert serves(length, width, packed=True) == "varlen"
            assert serves(length, width, packed=True, dtype=torch.float32) == "triton"
            assert serves(length, width, extras=True) == "triton"
    for op in ("add_norm", *GATHER):
        assert _dispatch.choose(op, "cuda", torch.bfloat16) == "triton"
    assert [backend for backend, _ in _attention_table.why("cuda")] == ["varlen", "sdpa", "triton"]


def test_cuda_is_never_chosen_without_evidence(monkeypatch):
    """Neither by the tables that tune makes, nor by a table that somebody else made."""
    doc = tune.data([machine(), *WINS], EMPTY)
    assert "cuda" not in {rule["backend"] for rule in doc["attention"]}
    apply(doc, monkeypatch)
    assert serves(50) == "triton"
    rule = {"device": "cuda", "backend": "cuda", "longest": 64, "why": "wishful thinking"}
    apply({**EMPTY, "attention": [rule, *EMPTY["attention"]]}, monkeypatch)
    assert serves(50) != "cuda"
    assert "cuda" not in [backend for backend, _ in _attention_table.why("cuda")]
    for op in GATHER:
        assert _dispatch.choose(op, "cuda", torch.bfloat16) == "triton"


def test_measured_wins_with_evidence_choose_cuda(monkeypatch):
    doc = tune.data([*evidence(), *WINS], EMPTY)
    apply(doc, monkeypatch)
    assert [serves(n) for n in (1, 17, 18, 50, 51, 197, 198, 257)] == [*["cuda"] * 4, *["triton"] * 2, *["sdpa"] * 2]
    assert serves(50, 32) == "cuda"  # narrower than measured: as the next wider one
    assert serves(50, 80) == "sdpa"  # wider than measured: as before
    assert serves(50, dtype=torch.float16) == "cuda"
    assert serves(50, dtype=torch.float32) == "sdpa"  # not measured
    assert serves(50, extras=True) == "triton"  # what the kernel does not take goes on down the table
    shown = dict(_attention_table.why("cuda"))
    assert "up to 50 queries and keys" in shown["cuda"]
    assert "measured on NVIDIA Test" in shown["cuda"]
    assert "heads 1 to 64 wide" in shown["cuda"]


def test_packed_and_dense_calls_have_rules_of_their_own(monkeypatch):
    packed = timed(49, packed=True, varlen=10, maefast_triton=20, maefast_cuda=30)
    doc = tune.data([*evidence(), *WINS, *packed], EMPTY)
    apply(doc, monkeypatch)
    assert serves(49) == "cuda"
    assert [rule.backend for rule in _attention_table.TABLE if rule.packed] == ["varlen"]
    # A window that measured only one kind leaves the rules of the other.
    again = tune.data([*evidence(), *WINS], doc)
    assert [r for r in again["attention"] if r.get("packed")] == [r for r in doc["attention"] if r.get("packed")]
    assert tune.data([*evidence(), *WINS, *packed], doc) == doc


def test_a_gain_within_the_noise_changes_nothing(monkeypatch):
    apply(tune.data([*evidence(), *timed(50, eager=100, maefast_cuda=99)], EMPTY), monkeypatch)
    assert serves(50) == "sdpa"


def test_rules_of_width_and_dtype_are_traced(monkeypatch):
    """torch.compile reads the table; a rule must not break the graph."""
    rule = {"device": "cpu", "backend": "sdpa", "longest": 50, "why": "measured on a test", "packed": False}
    rule |= {"dtypes": ["float32"], "widths": [0, 32]}
    apply({**EMPTY, "attention": [rule, *EMPTY["attention"]]}, monkeypatch)
    q = torch.randn(2, 5, 3, 2, 16)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), ops.attention(q, backend="reference"))


def test_several_batches_count_alike():
    found = [*timed(50, batch=64, eager=10, maefast_triton=30), *timed(50, batch=1024, eager=1000, maefast_triton=300)]
    (rule,) = tune.attention_rules(lines.latest(found), "measured", False)
    assert rule["backend"] == "triton"
    found += timed(50, batch=256, eager=20, maefast_triton=40)
    (rule,) = tune.attention_rules(lines.latest(found), "measured", False)
    assert rule["backend"] == "sdpa"


def test_other_ops_need_a_measured_gain_too(monkeypatch):
    def window(triton: float | None) -> list[lines.Line]:
        found = [*evidence(ops=GATHER)[:-1], line("all-tests", "tests/ops/test_embed.py::test_a[cuda]", "passed")]
        base = {"op": "gather_tokens", "shape": SHAPE, "dtype": "bfloat16", "direction": "forward", **CLOCK}
        for variant, time in (("maefast-cuda", 1e-5), ("maefast-triton", triton)):
            if time is not None:
                record = {**base, "variant": variant, "median_s": time}
                found.append(line("speed", f"op/gather/{variant}", "measured", record=record))
        return found

    for triton, faster, chosen in ((None, None, "triton"), (0.9e-5, 0.9, "triton"), (1.2e-5, 1.2, "cuda")):
        doc = tune.data(window(triton), EMPTY)
        assert doc["evidence"]["cuda"]["gather_tokens"]["faster"] == faster
        apply(doc, monkeypatch)
        assert _dispatch.choose("gather_tokens", "cuda", torch.bfloat16) == chosen
    assert "1.20x" in _dispatch.why("gather_tokens", "cuda")[1]


def test_the_routes_of_a_convolution(monkeypatch):
    found = [machine()]
    for cell, times in ((8, {"halo": 10, "taps": 30, "dense": 20}), (4, {"halo": 10, "taps": 20}),
                        (2, {"halo": 20, "taps": 10, "implicit": 30}), (1, {"taps": 20, "implicit": 10})):  # fmt: skip
        for route, time in times.items():
            record = {"op": "conv", "variant": f"maefast-{route}", "median_s": time * 1e-6}
            what = {"cell": cell, "grouped": False, "dtype": "bfloat16"}
            found.append(line("tune", f"route/{cell}/{route}", "measured", record=record, conv=what))
    apply(tune.data(found, EMPTY), monkeypatch)
    window = _conv_table.Window((3, 3), (1, 1), (1, 1), (1, 1))
    route = lambda side, groups=1: _conv_table.choose(  # noqa: E731
        _conv_table.Call("cuda", torch.bfloat16, (side, side), window, groups, 64, 64, False), None, None
    )[1]
    assert [route(side) for side in (16, 8, 4, 2, 1)] == ["halo", "halo", "halo", "taps", "implicit"]
    assert route(8, 2) == "halo"  # grouped: not measured, as before
    assert [rule for rule in _conv_table.TABLE if rule.device == "cpu"] == [
        rule for rule in _dispatch_data.parse(BEFORE).conv if rule.device == "cpu"
    ]
    assert [name for name, _ in _conv_table.why("cuda")].count("implicit") == 1


# --- files and commands ------------------------------------------------------------------------------------------


def write(path, found) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def test_command(tmp_path, capsys):
    file, target = tmp_path / "lines", tmp_path / "data.json"
    write(file, [*evidence(), *WINS])
    target.write_text(tune.text(EMPTY))
    assert tune.main([str(file), "--data", str(target)]) == 0
    assert "evidence cuda   attention: tested on NVIDIA Test" in capsys.readouterr().out
    assert json.loads(target.read_text()) == EMPTY
    assert tune.main([str(file), "--data", str(target), "--write"]) == 0
    assert _dispatch_data.read(target).attention[0].backend == "cuda"
    assert tune.main([str(file), "--data", str(target), "--write"]) == 0  # again: nothing changes
    assert "evidence" not in capsys.readouterr().out.rpartition("wrote")[0].rpartition("wrote")[2]
    write(file, [machine(kind="cpu")])
    assert tune.main([str(file), "--data", str(target)]) == 1


def test_the_file_is_as_tune_writes_it():
    assert _dispatch_data.PATH.read_text() == tune.text(BEFORE)


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"conv": [{"device": "cuda"}]}, {"attention": [{"device": "cpu", "nonsense": 1}]}]
)
def test_data_that_is_not_well_formed(change):
    with pytest.raises(ValueError, match="dispatch data"):
        _dispatch_data.parse({**BEFORE, **change})


# --- the summary -------------------------------------------------------------------------------------------------


def step(peer: str, ratio: float) -> lines.Line:
    shape = {"batch": 256, "img_size": [224, 224], "patch_size": [16, 16]}
    record = {"preset": "vit_b", "dtype": "bfloat16", "shape": shape, "peer": peer, "ratio": ratio, "step_s": ratio,
              "low_s": ratio, "high_s": ratio, "peak_bytes": 2**30, "rounds": 3}  # fmt: skip
    return line("speed", f"step/{peer}", "measured", record=record, settings={"steps_a_round": 5})


def test_summary_of_a_good_window(tmp_path, capsys):
    found = [*evidence(), *WINS, step("maefast", 1.0), step("plain", 1.5),
             line("speed", "plan", "planned", ids=["step/vit_l"])]  # fmt: skip
    write(tmp_path / "lines", found)
    assert summary.main([str(tmp_path / "lines"), "--results", str(tmp_path / "out"), "--name", "test"]) == 0
    out = capsys.readouterr().out
    for part in ("NVIDIA Test", "plain: 1.50x", "cuda 10, triton 20, eager 30", "smoke     2 passed",
                 "not run in speed: step/vit_l"):  # fmt: skip
        assert part in out
    assert out.strip().endswith("CORRECTNESS HELD IN WHAT RAN")
    (folder,) = (tmp_path / "out").iterdir()  # of the device
    assert folder.name == "nvidia-test"
    assert results.read(folder / "micro-test.json")["records"]
    assert results.read(folder / "step-vit_b-bfloat16-b256-test.json")["peers"] == ["maefast", "plain"]


@pytest.mark.parametrize(
    ("found", "stages", "wrong", "trouble"),
    [
        (evidence(), ["smoke", "all-tests"], 0, 0),
        (evidence(outcome="failed"), ["smoke", "all-tests"], 1, 0),
        (evidence(outcome="crashed"), ["smoke"], 1, 0),
        (evidence(outcome="cut"), ["smoke"], 0, 1),
        (evidence(test="timeout"), ["all-tests"], 2, 0),
        (evidence(), ["build", "smoke"], 1, 0),  # no build was recorded
        (evidence(), ["smoke", "speed"], 0, 1),
        ([*evidence(), line("speed", "a", "failed", error="WRONG RESULT, not timed")], ["speed"], 1, 1),
        ([*evidence(), line("speed", "a", "failed", error="out of memory"), *WINS], ["speed"], 0, 1),
    ],
)
def test_verdict(found, stages, wrong, trouble):
    got = summary.verdict(found, stages)
    assert (len(got[0]), len(got[1])) == (wrong, trouble), got


def test_failures_show_the_end_of_their_error(tmp_path, capsys):
    bad = line("smoke", "cuda/a/bfloat16", "failed", error="relative error 0.5")
    write(tmp_path / "lines", [*evidence(), bad])
    assert summary.main([str(tmp_path / "lines")]) == 1
    out = capsys.readouterr().out
    assert "failed smoke cuda/a/bfloat16: relative error 0.5" in out
    assert "CORRECTNESS DID NOT HOLD" in out
