"""Attentive probing: against a plain definition, on what a mean cannot tell, and as a command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from maefast import cli
from maefast.errors import ConfigError
from maefast.probe.attentive import AttentivePool, attentive_probe
from maefast.probe.tokens import tokens_of
from maefast.train import pretrain
from tests.train.common import convnet_config, tiny_config, write_photos


def test_the_pool_is_its_definition():
    torch.manual_seed(0)
    model = AttentivePool(128, 5).double().eval()
    tokens = torch.randn(3, 7, 128, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(tokens, (128,), model.norm.weight, model.norm.bias, 1e-6)
    keys, values = (normed @ model.kv.weight.T + model.kv.bias).chunk(2, -1)
    made = []
    for head in range(2):
        part = slice(64 * head, 64 * (head + 1))
        scores = keys[..., part] @ model.query[head] / 8
        made.append((scores.softmax(1)[..., None] * values[..., part]).sum(1))
    pooled = torch.cat(made, 1) / (1 + 1e-6) ** 0.5  # batch statistics as they start
    torch.testing.assert_close(model(tokens), pooled @ model.head.weight.T + model.head.bias, rtol=1e-10, atol=1e-12)


def test_it_finds_what_the_mean_hides():
    """The class is the sign of one token that says by another number which one it is; the rest of the tokens are noise
    whose sum takes the sign away."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1000, 6, 16)).astype(np.float32)
    labels, place, rows = rng.integers(0, 2, 1000), rng.integers(0, 6, 1000), np.arange(1000)
    tokens[..., 0] = 0
    tokens[rows, place, 0] = 8
    tokens[rows, place, 1] = 3 * (2 * labels - 1)
    others = tokens[..., 1].sum(1) - tokens[rows, place, 1]
    tokens[rows, (place + 1) % 6, 1] -= others + tokens[rows, place, 1]
    assert np.abs(tokens[..., 1].sum(1)).max() < 1e-4
    read = lambda chosen: torch.from_numpy(tokens[chosen])  # noqa: E731
    how = {"seed": 3, "steps": 400, "decays": (0.1, 0.01)}
    found = attentive_probe(read, rows[:800], labels[:800], rows[800:], **how)
    assert (found.found == labels[800:]).mean() > 0.9
    assert [decay for decay, _ in found.grid] == [0.1, 0.01]
    state, told = torch.get_rng_state(), []
    again = attentive_probe(
        read, rows[:800], labels[:800], rows[800:], **how, progress=lambda *steps: told.append(steps)
    )
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}
    assert np.array_equal(again.found, found.found)
    assert again.grid == found.grid
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_are_tokens_and_packed_samples_are_refused():
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(tokens_of(maps, 0)[1, 7], maps[1, :, 1, 2])
    assert tokens_of(torch.randn(2, 9, 3), 1).shape == (2, 8, 3)
    with pytest.raises(ConfigError, match="as many tokens of each sample"):
        tokens_of(torch.randn(9, 3), 0)


@pytest.mark.parametrize("kind", ["vit", "fcmae"])
def test_the_command(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(attentive_probe.__kwdefaults__, "steps", 20)
    photos = write_photos(tmp_path / "photos", count=15)
    config = tiny_config(photos, tmp_path / "run", steps=1)
    pretrain(config if kind == "vit" else convnet_config("fcmae", photos, tmp_path / "run", steps=1))
    arguments = ["probe", tmp_path / "run", "--data", photos, "-o", tmp_path / "probe", "--workers", 0, "--tsne"]
    arguments += ["--pool", "attentive", *(["--baselines"] if kind == "vit" else [])]
    result = CliRunner().invoke(cli.app, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    assert " numbers per image ..." in result.output
    document = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert document["attentive"]["count"] == document["knn"]["count"] == 3
    assert (tmp_path / "probe" / "tsne.png").is_file()
    tokens = [np.load(path, mmap_mode="r") for path in sorted((tmp_path / "probe" / "features").glob("tokens-*.npy"))]
    assert len(tokens) == (2 if kind == "vit" else 1)
    assert all(len(part) == 15 for part in tokens)
    if kind == "vit":
        assert "attentive" in document["baselines"]["random weights"]
        assert "attentive" not in document["baselines"]["pixels"]
        assert not np.array_equal(*tokens)
