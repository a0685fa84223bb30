"""Which results are of the code as it is, and where `maefast bench report` shows the others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("rich")

from maefast.bench import freshness, overview, report, results
from tests.bench.common import ENVIRONMENT, micro_document, step_document

ROOT = Path(__file__).resolve().parents[2]
OPS = "maefast/ops/embed.py"  # of gather_tokens
CODE = {
    OPS: "def gather_tokens(x, ids):\n    return x[ids]\n",
    "bench/micro/bench_embed.py": "OPS = []\n",
    "maefast/models/mae.py": "from maefast.ops import mask\n",
    "maefast/ops/mask.py": "",
    "maefast/graphs/step.py": "",
    "bench/peers/models.py": "",
    "bench/peers/worker.py": "",
    "kernels/mask.py": "",
    "csrc/build/cpu.cmake": "",
}
PAGE = f"# A page\n\n{report.BEGIN}\n{report.END}\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the sources that two kinds of result depend on, and empty pages."""
    for path, text in {**CODE, **{str(p): PAGE for p in (report.PAGE, report.EARLIER, report.README)}}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for module in (freshness, report):
        monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "bench" / "results")
    forget()
    yield tmp_path
    forget()


def forget():
    freshness._digest.cache_clear()
    freshness._tree.cache_clear()


def change(checkout, path=OPS, text="def gather_tokens(x, ids):\n    return x.index_select(0, ids)\n"):
    (checkout / path).write_text(text)
    forget()


def git(folder, *arguments):
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    run = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def is_current(doc):
    found = {freshness.current(doc, record) for record in doc["records"]}
    assert len(found) == 1
    return found.pop()


def test_a_result_is_current_until_its_code_changes(checkout):
    micro, step = micro_document(), step_document()
    assert list(micro["environment"]["code"]) == ["ops/embed"]
    assert list(step["environment"]["code"]) == ["step/vit"]
    assert is_current(micro)
    assert is_current(step)
    change(checkout, text='"""About."""\n\n\ndef gather_tokens( x, ids ):  # a note\n    return x[ids]\n')
    assert is_current(micro)
    change(checkout)
    assert not is_current(micro)
    assert is_current(step), "it runs another file"
    change(checkout, "maefast/ops/mask.py", "X = 1\n")
    assert not is_current(step)


def test_digests_of_when_it_was_measured_stay(checkout):
    """Lines of a GPU become results later, elsewhere."""
    then = {**ENVIRONMENT, "code": freshness.digests(["ops/embed", "step/vit"], "cpu")}
    change(checkout)
    doc = results.document("micro", then, {}, [], micro_document()["records"])
    assert doc["environment"]["code"] == {"ops/embed": then["code"]["ops/embed"]}
    assert not is_current(doc)


def test_without_sources_there_are_no_digests(checkout, monkeypatch):
    monkeypatch.setattr(freshness, "CHECKOUT", None)
    forget()
    assert micro_document()["environment"]["code"] == {}


def test_every_kind_of_result_has_a_target():
    names = {"micro": "ops", "step": "step", "dropin": "dropin", "recipes": "recipes"}
    known = {target.partition("/")[0] for target in freshness.all_targets()}
    assert {names.get(kind, kind) for kind in results.KINDS} <= known


def test_an_op_that_is_gone_is_not_current(checkout):
    doc = micro_document()
    for record in doc["records"]:
        record["op"] = "gone"
    assert not is_current(doc)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_result_without_digests_is_held_against_its_commit(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "one")
    doc = micro_document()
    doc["environment"] = {**ENVIRONMENT, "commit": git(checkout, "rev-parse", "--short=12", "HEAD")}
    assert is_current(doc)
    assert not is_current({**doc, "environment": {**doc["environment"], "dirty": True}})
    assert not is_current({**doc, "environment": {**doc["environment"], "dirty": None}})
    assert not is_current({**doc, "environment": {**doc["environment"], "commit": "0123456789ab"}}), (
        "not in the history"
    )
    change(checkout)
    assert not is_current(doc)
    shutil.rmtree(checkout / ".git")
    change(checkout, text=CODE[OPS])
    assert not is_current(doc), "without the history nothing is known"


def test_earlier_results_have_a_page_of_their_own(checkout, capsys):
    results.write(results.RESULTS / "test-cpu" / "micro.json", micro_document())
    results.write(results.RESULTS / "test-cpu" / "step.json", step_document())
    page, earlier, readme = (checkout / path for path in (report.PAGE, report.EARLIER, report.README))
    charts = checkout / report.CHARTS / "test-cpu"
    assert report.main(["--check"]) == 1, "nothing is written yet"
    assert report.main([]) == 0
    assert "gather_tokens" in page.read_text()
    assert "vit_b" in page.read_text()
    assert "Nothing." in earlier.read_text()
    assert "| `vit_b`, 224x224, batch 16 | 1.50x (1.50x the memory) | - |" in readme.read_text()
    assert {path.name for path in charts.iterdir()} == {"models.png", "memory.png", "ops.png"}
    change(checkout)
    assert report.main(["--check"]) == 0, "a commit to a kernel leaves the check green"
    error = capsys.readouterr().err
    assert "shows test-cpu/micro.json, but code has changed since" in error
    assert ": ops/embed\n" in error
    assert "step.json" not in error
    assert report.main([]) == 0
    assert "gather_tokens" not in page.read_text()
    assert "vit_b" in page.read_text()
    assert "gather_tokens" in earlier.read_text()
    assert "at 0123456789ab" in earlier.read_text()
    assert "[earlier code](results-earlier.md): Test CPU" in page.read_text()
    assert {path.name for path in charts.iterdir()} == {"models.png", "memory.png"}
    assert report.main(["--check"]) == 0
    change(checkout, "maefast/models/mae.py", "X = 1\n")
    assert report.main([]) == 0
    assert "CPU figures are not measured yet" not in page.read_text()
    assert "vit_b" not in page.read_text()
    assert not charts.exists()
    assert "measured with [earlier code](docs/results-earlier.md), at 0123456789ab" in readme.read_text()
    assert report.main(["--check"]) == 0
    (results.RESULTS / "test-cpu" / "step.json").unlink()
    assert report.main(["--check"]) == 1
    assert report.main(["--page", str(checkout / "all.md")]) == 0
    assert "gather_tokens" in (checkout / "all.md").read_text(), "a page of its own shows everything"


def test_the_short_tables():
    new, old = step_document(ratio=2.0), step_document(ratio=1.5)
    assert overview.tables([], [], "old.md") == "No whole step has been measured on a CPU yet.\n"
    text = overview.tables([new], [], "old.md")
    assert "**Test CPU**, 2 threads, torch 2.13.0, at 0123456789ab." in text
    assert "| `vit_b`, 224x224, batch 16 | 2.00x (2.00x the memory) | - |" in text
    for record in old["records"]:
        record["dtype"] = "bfloat16"
    old["environment"] = {**old["environment"], "commit": "ba9876543210"}
    text = overview.tables([new], [old], "old.md")
    assert "| 2.00x (2.00x the memory) | 1.50x (1.50x the memory) † |" in text
    assert "†: measured with [earlier code](old.md), at ba9876543210." in text
    text = overview.tables([], [old], "old.md")
    assert "measured with [earlier code](old.md), at ba9876543210." in text
    assert "†" not in text
    shape = {"batch": 2, "img_size": [224, 224]}
    base = {"preset": "base", "family": "mae", "dtype": "float32", "shape": shape, "rounds": 3}
    base |= {"memory_ratio": 1.05, "step_s": 1, "low_s": 1, "high_s": 1, "peak_bytes": 1}
    records = [
        {**base, "peer": name, "ratio": ratio}
        for name, ratio in (("accelerated", 1.0), ("as_is", 2.5), ("tuned", 1.75), ("as_is_compiled", 1.5))
    ]
    records[-1]["ratio_compiled"] = 1.25
    doc = results.document("dropin", ENVIRONMENT, {"title": "MAE"}, [], records)
    assert "| MAE, 224x224, batch 2 | 1.75x (both compiled 1.25x) | - |" in overview.tables([doc], [], "old.md")
