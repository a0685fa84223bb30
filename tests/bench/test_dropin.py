"""Other people's models at toy size, as they are and accelerated: they agree, records are complete. No times judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from maefast.bench import dropin, report, results, sections, step
from maefast.bench.peers import checkouts, dropin_models, worker
from tests.bench.common import ENVIRONMENT

FAMILIES = dropin_models.families()


def config(family: str, **more) -> dict:
    chosen = FAMILIES[family]
    base = {"family": family, "sizes": chosen.sizes("toy"), "checkouts": [], "channels_last": chosen.convnet}
    return {**base, **more}


def build(peer: str, family: str, dtype: str) -> dict:
    one = worker.Worker()
    batch = FAMILIES[family].presets["toy"]["batch"]
    given = {"batch": batch, "dtype": dtype, "device": "cpu", "source": "dropin_models"}
    try:
        answer = one.build(peer, config(family), **given)
    except ImportError as error:
        pytest.skip(str(error))
    return answer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peers_compute_the_same(family, dtype):
    names = ["as_is", "accelerated", *([FAMILIES[family].variant] if FAMILIES[family].tune else [])]
    answers = {name: build(name, family, dtype) for name in names}
    step._agree(answers, dtype, "as_is")
    assert len({answer["parameters"] for answer in answers.values()}) == 1
    assert len({answer["code"] for answer in answers.values()}) == 1
    assert "replaced" in answers["accelerated"]["report"]
    assert "report" not in answers["as_is"]


def test_measure(tmp_path, capsys):
    written = tmp_path / "dropin.json"
    given = ["--family", "mae", "--preset", "toy", "--rounds", "2", "--steps", "1", "--json", str(written)]
    assert dropin.main(given) == 0
    assert "time vs accelerated" in capsys.readouterr().out
    doc = results.read(written)
    ours, theirs, _ = doc["records"]
    assert [r["peer"] for r in doc["records"]] == ["accelerated", "as_is", "written"]
    assert ours["ratio"] == 1.0
    assert theirs["ratio"] > 0
    assert ours["last_loss"] == pytest.approx(theirs["last_loss"], rel=1e-3)
    assert doc["settings"]["origin"] == "structure"
    assert doc["settings"]["code"] == "bench/peers/public/mae.py"
    text = sections.dropin([{**doc, "file": "dropin.json"}])
    assert "MAE, toy" in text
    assert "as it is" in text
    assert [d["kind"] for d in report.load(tmp_path)] == ["dropin"]


def test_a_disagreement_is_refused(monkeypatch, capsys):
    def disagree(*args, **more):
        raise step.Disagreement("no time is given")

    monkeypatch.setattr(step, "race", disagree)
    assert dropin.main(["--family", "mae", "--preset", "toy"]) == results.WRONG
    assert "no time is given" in capsys.readouterr().err


class Answers:
    """In place of a worker."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def ask(self, **request) -> dict:
        return {"loss": self.loss}


def test_training_apart_is_refused():
    step._warm_up({"accelerated": Answers(1.0), "as_is": Answers(1.0005)}, "float32", "as_is")
    for loss in (1.01, float("nan")):
        with pytest.raises(step.Disagreement, match="accelerated: loss"):
            step._warm_up({"accelerated": Answers(loss), "as_is": Answers(1.0)}, "float32", "as_is")


def test_nothing_accelerated_is_an_error(monkeypatch):
    plain = dropin_models.Family(
        "plain",
        {"toy": {"batch": 1}},
        None,
        lambda sizes: nn.Linear(2, 2),
        lambda sizes, batch, generator: (torch.randn(batch, 2, generator=generator),),
        lambda model, x: model(x).sum(),
    )
    monkeypatch.setattr(dropin_models, "families", lambda: {"plain": plain})
    given = {"sizes": {}, "family": "plain", "checkouts": [], "channels_last": False}
    with pytest.warns(UserWarning, match="nothing to accelerate"), pytest.raises(RuntimeError, match="nothing was acc"):
        dropin_models.task("accelerated", config=given, batch=1, device="cpu", part="step")


def test_missing_code_is_named(tmp_path):
    given = config("spark")
    with pytest.raises(ImportError, match=r"keyu-tian/SparK \(its folder pretrain\)"):
        dropin_models.make(FAMILIES["spark"], given["sizes"], [str(tmp_path)])
    with pytest.raises(ImportError, match="leave --checkout out"):
        dropin_models.make(FAMILIES["hf_vitmae"], {}, [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no checkout"):
        checkouts.use([str(tmp_path / "no such")])
    with pytest.raises(ImportError, match="in none of the checkouts"):
        checkouts.origin(nn.Linear(1, 1), [str(tmp_path)])


def test_bad_arguments():
    with pytest.raises(ValueError, match="family"):
        dropin.measure("no such")
    with pytest.raises(ValueError, match="preset"):
        dropin.measure("mae", "no such")
    with pytest.raises(ValueError, match="unknown peer"):
        dropin_models.task("nonsense", config=config("mae"), batch=1, device="cpu", part="step")


def document(ratio: float, compiled: float | None, dtype: str = "bfloat16", kind: str = "cuda") -> dict:
    clock = {"step_s": 1.0, "low_s": 1.0, "high_s": 1.0, "rounds": 3, "first_loss": 1.0, "images_per_s": 1.0}
    base = {"family": "mae", "preset": "base", "dtype": dtype, "shape": {"batch": 2, "img_size": [224, 224]}, **clock}
    records = [
        {**base, "peer": peer, "ratio": r, "memory_ratio": r, "peak_bytes": 1}
        for peer, r in (("accelerated", 1.0), ("as_is", ratio + 1), ("tuned", ratio), ("as_is_compiled", 1.1))
    ]
    if compiled:
        records[-1]["ratio_compiled"] = compiled
    settings = {"title": "MAE", "code": "x.py", "origin": "structure", "channels_last": False, "steps_a_round": 2}
    environment = {**ENVIRONMENT, "kind": kind}
    peers = [record["peer"] for record in records]
    return {**results.document("dropin", environment, settings, peers, records), "file": "x.json"}


def test_shortfalls_are_named():
    text = sections.dropin([document(1.5, 1.1)])
    assert "Short of the aim of 1.6x over the model as it is (1.50x)" in text
    assert "Short of the aim of 1.2x, compiled against compiled (1.10x)" in text
    assert "As it is, torch.compile, vs accelerated, torch.compile: 1.10x." in text
    assert "Short" not in sections.dropin([document(1.7, 1.3)])
    assert "Short" not in sections.dropin([document(1.7, None)])
    # In float32 the aim depends on the processor.
    assert "Short" not in sections.dropin([document(1.5, None, "float32", "cpu")])
    amd = document(1.5, None, "float32", "cpu")
    amd["environment"] = {**amd["environment"], "cpu": "AMD EPYC"}
    assert "Short of the aim of 2.2x" in sections.dropin([amd])


@pytest.mark.gpu
def test_on_a_gpu():
    doc = dropin.measure("mae", "toy", dtype="bfloat16", device="cuda", rounds=1, steps=2)
    assert all("step_s" in record for record in doc["records"])
