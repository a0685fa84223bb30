"""The end-to-end step at toy size: peers agree, records are complete. No times are judged."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")

from bench import results, step
from bench.peers import models, worker


def test_measure(tmp_path, capsys):
    doc = step.measure("toy", peers=("plain", "nonsense"), rounds=2, steps=1)
    assert results.read(results.write(tmp_path / "step.json", doc)) == doc
    assert [r["peer"] for r in doc["records"]] == ["maefast", "plain", "nonsense"]
    ours, plain, nonsense = doc["records"]
    assert ours["ratio"] == 1.0
    assert plain["ratio"] > 0
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    # The same steps on the same weights: training stays together, too.
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-3)
    assert ours["parameters"] == plain["parameters"]
    assert "unknown peer" in nonsense["error"]  # reported, not fatal
    doc["records"] = [ours, plain]
    step.show(doc)
    out = capsys.readouterr().out
    assert "time vs maefast" in out
    assert "plain eager model" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["maefast", "plain", "hf"])
def test_peers_compute_the_same(peer, dtype):
    if peer == "hf":
        pytest.importorskip("transformers")
    from maefast.models import create

    compare(peer, create(**step.PRESETS["toy"]["model"]), dtype, "step")


def compare(peer: str, model, dtype: str, part: str) -> None:
    answers = {}
    request = {"tokens": model.num_patches, "mask_ratio": 0.6, "part": part}
    for name in ("plain", peer):
        one = worker.Worker()
        answers[name] = one.build(name, model.config, batch=2, dtype=dtype, device="cpu", **request)
    step._agree(answers, dtype)
    assert answers[peer]["parameters"] == answers["plain"]["parameters"]


@pytest.mark.parametrize("part", ["step", "encoder"])
def test_convnets_compute_the_same(part):
    from maefast.models import create

    compare("maefast", create("spark_convnext_tiny", img_size=64, drop_path=0.0, decoder_width=64), "float32", part)
    compare("maefast", create("fcmae_convnextv2_atto", img_size=64), "float32", "step")
    with pytest.raises(ValueError, match="no masked convnet"):
        models.build("hf", create("fcmae_convnextv2_atto", img_size=64).config, 0.6, "cpu")


def test_disagreement_is_refused():
    good = {"loss": 1.0, "grad_norm": 2.0}
    step._agree({"plain": good, "maefast": {"loss": 1.0 + 1e-7, "grad_norm": 2.0}}, "float32")
    for bad in (
        {"loss": 1.001, "grad_norm": 2.0},
        {"loss": 1.0, "grad_norm": 2.1},
        {"loss": float("nan"), "grad_norm": 2},
    ):
        with pytest.raises(step.Disagreement, match="maefast"):
            step._agree({"plain": good, "maefast": bad}, "float32")


def test_bad_arguments():
    with pytest.raises(ValueError, match="preset"):
        step.measure("no such")
    with pytest.raises(ValueError, match="unknown peer"):
        models.build("nonsense", {**_config()}, 0.75, "cpu")


def _config() -> dict:
    from maefast.models import create

    return create(**step.PRESETS["toy"]["model"]).config


@pytest.mark.gpu
def test_on_a_gpu():
    records = step.compare("toy", dtype="bfloat16", device="cuda", peers=("plain",), rounds=1, steps=2)
    assert all("step_s" in record for record in records)
    assert torch.cuda.is_available()
