"""The page shows what the JSON holds, and bad JSON is refused."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("rich")

from maefast.bench import report, results
from tests.bench.common import micro_document, step_document


def test_the_committed_page_is_up_to_date():
    assert report.main(["--check"]) == 0, "run python -m maefast.bench.report"


def test_tables(tmp_path):
    results.write(tmp_path / "micro.json", micro_document())
    results.write(tmp_path / "step.json", step_document())
    text = report.render(report.load(tmp_path))
    assert "| 3.00x |" in text
    assert "| 1.50x |" in text
    assert "GPU figures are not measured yet" in text
    assert "Test CPU" in text
    assert "0123456789ab" in text
    assert "no compiler" in text
    assert "Short of the aim of 2x over eager (attention: 1.5x, bfloat16 3x): none." in text


def test_shortfalls_are_named():
    doc = {**micro_document(ratio=1.5), "file": "x.json"}
    assert "gather_tokens forward float32 vit_b b16 (1.50x)" in report.micro(doc)
    doc = {**step_document(ratio=1.1), "file": "x.json"}
    assert "Short of the aim of 2.3x over" in report.step(doc)
    assert "Short" not in report.step({**step_document(ratio=2.5), "file": "x.json"})


def test_newest_result_wins(tmp_path):
    old, new = micro_document(ratio=3.0), micro_document(ratio=4.0)
    new["environment"] = {**new["environment"], "date": "2026-02-02 00:00 UTC"}
    results.write(tmp_path / "a.json", new)
    results.write(tmp_path / "b.json", old)
    docs = report.load(tmp_path)
    assert [doc["file"] for doc in docs] == ["a.json"]


def test_a_later_run_of_some_cases_leaves_the_others(tmp_path):
    old, new = micro_document(ratio=3.0), micro_document(ratio=4.0)
    old["records"] += [{**record, "op": "patch_embed"} for record in old["records"]]
    new["environment"] = {**new["environment"], "date": "2026-02-02 00:00 UTC"}
    results.write(tmp_path / "a.json", old)
    results.write(tmp_path / "b.json", new)
    found = {doc["file"]: {record["op"] for record in doc["records"]} for doc in report.load(tmp_path)}
    assert found == {"a.json": {"patch_embed"}, "b.json": {"gather_tokens"}}


def test_further_peers_have_a_table():
    doc = {**micro_document(ratio=3.0), "file": "x.json"}
    assert "Further peers" not in report.micro(doc)
    ours = next(record for record in doc["records"] if record["variant"] == "maefast-cpu")
    ours["ratios"]["jagged"] = 2.5
    doc["records"].append({**ours, "variant": "varlen", "error": "CUDA only"})
    text = report.micro(doc)
    assert "| 2.50x jagged | 2.50x | gather_tokens | fwd | float32 | vit_b b16 | cpu |" in text
    assert "vs varlen" not in text
    assert "ops.linear" not in text
    doc["settings"]["linear_library"] = "onednn"
    assert "`ops.linear` chose the library 'onednn' here." in report.micro(doc)
    assert "Not timed: varlen: CUDA only (1 cases)." in text


def test_page_is_replaced_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    docs = [{**micro_document(), "file": "x.json"}]
    assert not report.write(page, docs, check=True)
    assert "old" in page.read_text()
    assert not report.write(page, docs)
    assert report.write(page, docs)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write(page, docs)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("schema",), 99, "schema"),
        (("kind",), "other", "kind"),
        (("environment",), {}, "environment lacks"),
        (("records",), [], "no records"),
        (("records", 0, "median_s"), float("nan"), "median_s"),
        (("records", 0, "median_s"), -1.0, "median_s"),
        (("records", 0, "low_s"), "fast", "low_s"),
    ],
)
def test_bad_documents_are_refused(path, value, match, tmp_path):
    doc = copy.deepcopy(micro_document())
    target = doc
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=match):
        results.validate(doc)
    with pytest.raises(ValueError, match=match):
        results.write(tmp_path / "x.json", doc)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json"):
        results.read(tmp_path / "x.json")
