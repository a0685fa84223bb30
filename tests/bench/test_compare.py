"""Two runs of the suite: noise is not called a change, a kernel that was slowed is."""

from __future__ import annotations

import copy
import random
import time

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from maefast.bench import compare, machine, results
from maefast.bench.micro import __main__ as micro
from maefast.bench.micro import bench_restore
from tests.bench.common import LIMITS, micro_document


def run_of(seed: int, slow: float = 1.0, machine: float = 1.0, ops: int = 20, rounds: int = 21) -> dict:
    """A document of `ops` cases with 3 % of noise in every round, the first of which is `slow` times as slow as it was,
    on a machine `machine` times as slow."""
    draw = random.Random(seed)
    doc = micro_document()
    eager, ours, _ = doc["records"]
    records = []
    for number in range(ops):
        weather = [machine * draw.gauss(1, 0.2) for _ in range(rounds)]  # of both sides alike
        for record, seconds in ((eager, 3e-3), (ours, 1e-3 * (slow if number == 0 else 1))):
            samples = [seconds * today * draw.gauss(1, 0.03) for today in weather]
            records.append(
                {**record, "op": f"op {number}", "samples_s": samples, "median_s": sorted(samples)[rounds // 2]}
            )
    return {**doc, "records": records}


def test_noise_is_not_a_change():
    for seed in range(20):
        rows = compare.compare([run_of(seed)], [run_of(seed + 100)])
        assert len(rows) == 20
        assert {row.verdict for row in rows} == {"same"}


@pytest.mark.parametrize(("slow", "verdict"), [(1.2, "slower"), (0.8, "faster")])
def test_a_change_is_told_from_it(slow, verdict):
    for seed in range(20):
        rows = compare.compare([run_of(seed)], [run_of(seed + 100, slow)])
        moved = [row for row in rows if row.verdict != "same"]
        assert [(row.case[1], row.verdict) for row in moved] == [("op 0", verdict)]
        assert moved[0].change == pytest.approx(slow - 1, abs=0.06)
        assert moved[0].relative


def test_another_machine_is_told_apart_by_the_peer():
    other = run_of(1, machine=3.0)
    other["environment"] = {**other["environment"], "device": "Another CPU"}
    assert {row.verdict for row in compare.compare([run_of(0)], [other])} == {"same"}


def test_times_without_a_peer_need_one_device():
    alone = run_of(0)
    alone["records"] = [record for record in alone["records"] if record["variant"] != "eager"]
    slower = copy.deepcopy(alone)
    for record in slower["records"]:
        record["samples_s"] = [2 * seconds for seconds in record["samples_s"]]
    rows = compare.compare([alone], [slower])
    assert {row.verdict for row in rows} == {"slower"}
    assert not any(row.relative for row in rows)
    slower["environment"] = {**slower["environment"], "device": "Another CPU"}
    with pytest.raises(ValueError, match="of different devices"):
        compare.compare([alone], [slower])


def test_too_few_rounds_are_not_tested():
    rows = compare.compare([run_of(0, rounds=3)], [run_of(1, slow=2.0, rounds=3)])
    assert rows[0].verdict == "untested"
    assert rows[0].p is None


def test_nothing_in_common():
    other = run_of(0)
    for record in other["records"]:
        record["op"] += " of another kind"
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare([run_of(0)], [other])


def test_a_slowed_kernel_is_caught(tmp_path, monkeypatch, capsys):
    """Measured by the suite itself: the same code twice, then with a pause in our kernel."""

    monkeypatch.setattr(machine, "measure", lambda device: LIMITS)

    def measured(name: str) -> str:
        path = tmp_path / name
        assert micro.main(["--preset", "toy", "--family", "restore", "--dtype", "float32", "--peers", "eager",
                           "--rounds", "15", "--json", str(path)]) == 0  # fmt: skip
        return str(path)

    before, again = measured("before.json"), measured("again.json")
    (op,) = bench_restore.OPS
    pause = 3 * max(record["median_s"] for record in results.read(before)["records"] if "error" not in record)

    def slowed(inputs, backend):
        time.sleep(pause)
        return op.ours(inputs, backend)

    monkeypatch.setattr(bench_restore, "OPS", [type(op)(**{**vars(op), "ours": slowed})])
    after = measured("after.json")
    # A busy machine may move a toy's times by more than 5 %, so "the same" is judged generously here.
    assert compare.main([before, again, "--least", "1.0"]) == 0
    assert compare.main([before, after, "--least", "1.0"]) == 1
    out = capsys.readouterr().out
    assert "slower" in out
    assert "restore_tokens" in out


def test_command_line(tmp_path, capsys):
    for name, doc in (("a", run_of(0)), ("b", run_of(1, 1.5))):
        results.write(tmp_path / name / "micro.json", doc)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "20 cases: 1 slower, 0 faster, 0 untested, 19 same" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "b" / "micro.json"), str(tmp_path / "a" / "micro.json")]) == 0
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "missing.json")]) == 2
