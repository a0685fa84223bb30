"""An encoder's time against visible tokens and batch: what is run is the same on both sides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")

from maefast import models
from maefast.bench import results, scaling
from maefast.bench.peers.plain_mae import PlainMAE

TOY = {"embed_dim": 16, "depth": 1, "num_heads": 1, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1}


@pytest.fixture
def toy(monkeypatch):
    create = models.create
    monkeypatch.setattr(models, "create", lambda name: create("mae_tiny", img_size=224, patch_size=32, **TOY))


@pytest.mark.parametrize("keep", [1, 12, 49])
def test_both_encode_the_same_patches(toy, keep):
    torch.manual_seed(0)
    ours = models.create("any")
    plain = PlainMAE.from_config(ours.config)
    plain.load_state_dict(ours.state_dict())
    noise = torch.rand(2, 49)
    assert (
        plain.encode(torch.randn(2, 3, 224, 224), 1 - (keep + 0.5) / 49 if keep < 49 else 0.0, noise)[0].shape[1]
        == 1 + keep
    )
    values = [
        scaling.step(net, name, 2, keep, "float32", "cpu")(0) for net, name in ((ours, "maefast"), (plain, "plain"))
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)


def test_document_and_file(toy, tmp_path, capsys):
    assert scaling.main(["--quick", "--model", "toy", "--batch", "2", "--rounds", "2", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    assert path.name == "scaling-toy-float32.json"
    doc = results.read(path)
    assert [(r["peer"], r["visible"]) for r in doc["records"]] == [
        (peer, visible) for visible in (5, 12, 49) for peer in ("maefast", "plain")
    ]
    assert all(r["peak_bytes"] > 0 for r in doc["records"])
    for ours, plain in zip(doc["records"][::2], doc["records"][1::2]):
        assert ours["flops"] == plain["flops"] > 0
        assert ours["limit_share"] > 0
    assert doc["records"][0]["flops"] < doc["records"][-1]["flops"]
    assert doc["settings"]["cases_left_out"] == 0
    assert "100%" in capsys.readouterr().out


def test_a_stopped_run_leaves_what_it_measured(toy, tmp_path, monkeypatch):
    path, step = tmp_path / "scaling.json", scaling.step

    def stopped(net, name, batch, keep, *given):
        if keep > 5:
            raise KeyboardInterrupt
        return step(net, name, batch, keep, *given)

    monkeypatch.setattr(scaling, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["--quick", "--model", "toy", "--rounds", "1", "--json", str(path)])
    doc = results.read(path)
    assert [r["visible"] for r in doc["records"]] == [5, 5]
    assert doc["settings"]["cases_left_out"] == 2


def test_encoders_that_disagree_are_not_timed(toy, monkeypatch, capsys):
    load = PlainMAE.load_state_dict
    monkeypatch.setattr(
        PlainMAE, "load_state_dict", lambda self, state: load(self, {k: 2 * v for k, v in state.items()})
    )
    assert scaling.main(["--quick", "--model", "toy", "--batch", "1"]) == results.WRONG
    assert "disagree" in capsys.readouterr().err
