"""The page shows what the JSON holds, and bad JSON is refused."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("rich")

from maefast.bench import charts, report, results, sections
from tests.bench.common import ENVIRONMENT, micro_document, step_document


def test_the_committed_page_is_up_to_date():
    assert report.main(["--check"]) == 0, "run maefast bench report"


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
    text = sections.micro([{**micro_document(ratio=1.5, share=0.5), "file": "x.json"}])
    assert "none" not in text
    assert "2x over eager (attention: 1.5x, bfloat16 3x): gather_tokens forward float32 vit_b b16 (1.50x; the" in text
    assert "the limit allows 3.00x)" in text
    doc = {**step_document(ratio=1.1), "file": "x.json"}
    assert "Short of the aim of 2.3x over" in sections.step([doc])
    assert "Short" not in sections.step([{**step_document(ratio=2.5), "file": "x.json"}])


@pytest.mark.parametrize(("share", "words"), [(0.9, "the limit allows 1.67x"), (1.1, "beyond the limit of memory")])
def test_what_the_machine_does_not_allow_is_told_apart(share, words):
    text = sections.micro([{**micro_document(ratio=1.5, share=share), "file": "x.json"}])
    assert "bfloat16 3x): none." in text
    where = "Short of it where the limit of this machine does not allow it: gather_tokens forward float32 vit_b b16"
    assert f"{where} (1.50x; {words})" in text


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
    assert "Further peers" not in sections.micro([doc])
    ours = next(record for record in doc["records"] if record["variant"] == "maefast-cpu")
    ours["ratios"]["jagged"] = 2.5
    doc["records"].append({**ours, "variant": "varlen", "error": "CUDA only"})
    text = sections.micro([doc])
    assert "| 2.50x jagged | 2.50x | gather_tokens | fwd | float32 | vit_b b16 | cpu |" in text
    assert "vs varlen" not in text
    assert "ops.linear" not in text
    doc["settings"]["linear_library"] = "onednn"
    assert "`ops.linear` chose the library 'onednn' here." in sections.micro([doc])
    assert "Not timed: varlen: CUDA only (1 cases)." in text


def test_page_is_replaced_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert not report.write(page, "new", check=True)
    assert "old" in page.read_text()
    assert not report.write(page, "new")
    assert report.write(page, "new")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write(page, "new")


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


RECIPES = [
    {
        "recipe": "videomae",
        "size": "base",
        "batch": 1,
        "dtype": dtype,
        "ms": [20.0, 10.0],
        "ratio": 2.0,
        "memory_mib": [300.0, 200.0],
        "memory_ratio": 2 / 3,
        "other_ways": {"padded": 1.5},
    }
    for dtype in ("float32", "bfloat16")
]


def scaling_document() -> dict:
    rows = [
        {
            **{"peer": peer, "batch": 4, "visible": visible, "tokens": 196, "dtype": "float32", "ratio": slow},
            **{"median_s": slow * visible, "low_s": slow * visible, "high_s": slow * visible, "peak_bytes": 2**20},
        }
        for visible in (49, 196)
        for peer, slow in (("maefast", 1.0), ("plain", 1.25))
    ]
    rows += [{**row, "batch": 8, "visible": 49} for row in rows[:2]]
    settings = {"model": "mae_base", "part": "encoder", "rounds": 3, "batch": 4}
    return results.document("scaling", ENVIRONMENT, settings, ["maefast", "plain"], rows)


def every_kind() -> list[dict]:
    micro = micro_document()
    micro["settings"]["machine"]["matrix_tflops"] = {"float32": 0.1}
    for record in micro["records"]:
        record |= {"flops": 10**9, "min_bytes": 10**7}
    volume = {"batch": 1, "side": 96, "mask_ratio": 0.6, "dtype": "float32"}
    share = {"flops": 10**9, "limit": "matrix"}
    volumes = [{**volume, "peer": name, "best_s": s, "ratio": s} for name, s in (("maefast", 1.0), ("dense", 1.25))]
    volumes[0] |= {**share, "limit_share": 0.41, "peak_bytes": 2**30}
    shape = {"width": 32, "batch": 1, "tokens": 4, "depth": 1, "dtype": "float32", "threads": 1}
    blocks = [
        {**shape, "peer": name, "best_s": 1e-3, "time_to_eager": ratio, "kept_bytes": 100 * ratio}
        for name, ratio in (("maefast", 0.5), ("eager", 1.0))
    ]
    blocks[0] |= {**share, "limit_share": 0.42}
    toys = [{"model": "HF ViTMAE", "dtype": "float32", "ms": [2.0, 1.0], "ratio": 2.0, **share}]
    toys[0]["limit_share"] = [0.2, 0.43]  # as it is, accelerated
    sides = (("decode, simplejpeg", 0, 400), ("maefast", 0, 100), ("timm", 0, 80), ("maefast", 2, 150))
    loaders = [{"side": side, "workers": workers, "images_per_s": rate} for side, workers, rate in sides]
    made = {
        "recipes": [{**RECIPES[0], **share, "limit_share": [0.2, 0.44]}, RECIPES[1]],
        "volumes": volumes,
        "block": blocks,
        "toys": toys,
        "data": loaders,
    }
    docs = [results.document(kind, ENVIRONMENT, {"rounds": 3}, [], records) for kind, records in made.items()]
    return [micro, step_document(), scaling_document(), *docs]


def test_every_kind_has_a_section_and_its_charts(tmp_path):
    for number, doc in enumerate(every_kind()):
        results.write(tmp_path / "deep" / f"{number}.json", doc)
    (tmp_path / "evidence.json").write_text('{"kind": "evidence"}')  # other JSON is left alone
    assert report.main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n## Test CPU\n") == 1
    for title, _ in report.SECTIONS.values():
        assert (f"### {title}\n" in text) == (not title.startswith("Drop-in"))
    assert (
        "| 2.00x | 20 | 10 | 0.67x | 300 | 200 | 44% matrix "
        "| 2.00x | 20 | 10 | 0.67x | 300 | 200 | - | videomae | base, batch 1 |" in text
    )
    assert "| 1.00x | 1.00 | 41% matrix | 1024 | maefast |" in text
    assert "| 1.25x | 1.25 | - | - | dense |" in text  # as older files have it
    assert "| 0.50x | 1 | 42% matrix | 0.50x | float32 |" in text
    assert "| 2.00x | 2.00 | 1.00 | 43% matrix | float32 | HF ViTMAE |" in text
    assert "| 80 | 1.25x | 20% | timm | one core, in the main process |" in text
    assert "| 150 | - | - | maefast | 2 loader processes |" in text
    assert "| 1.50x | videomae | bfloat16 | padded |" in text
    assert "| 25% | 4 | 1.25x |" in text
    assert "Short of the aim of 1.5x (1.25x)" in text
    drawn = {path.stem for path in (tmp_path / "charts" / "test-cpu").iterdir()}
    assert drawn == set(charts.CHARTS)
    for name in drawn:
        assert f"(charts/test-cpu/{name}.png)" in text
    before = {path: path.read_bytes() for path in (tmp_path / "charts" / "test-cpu").iterdir()}
    assert report.main(["--results", str(tmp_path), "--check"]) == 0
    assert report.main(["--results", str(tmp_path)]) == 0
    assert all(path.read_bytes() == data for path, data in before.items()), "the same results, another picture"
    (tmp_path / "deep" / "0.json").unlink()
    assert report.main(["--results", str(tmp_path), "--check"]) == 1


def test_without_results_it_says_so(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 2


def test_committed_results_stand_in_the_folder_of_their_device():
    from maefast.bench.environment import slug

    for doc in results.read_all(results.RESULTS):
        assert doc["file"].split("/")[0] == slug(doc["environment"]["device"])
