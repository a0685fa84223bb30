"""bench/evidence.py: what it draws, and a run of it at toy size."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")
from maefast.bench import evidence
from tests.train.common import TINY


def test_shapes():
    """The same ones each time, all factors about as often, and a shape that can be seen."""
    drawn = [evidence.draw_shape(np.random.default_rng([1, i]), 32) for i in range(300)]
    again, factors = evidence.draw_shape(np.random.default_rng([1, 7]), 32)
    assert np.array_equal(np.asarray(again), np.asarray(drawn[7][0]))
    assert factors == drawn[7][1]
    for factor, count in (("shape", 8), ("colour", 6), ("place", 4)):
        found = Counter(factors[factor] for _, factors in drawn)
        assert len(found) == count
        assert min(found.values()) > 0.5 * len(drawn) / count
    assert min(np.ptp(np.asarray(image).astype(int), axis=(0, 1)).max() for image, _ in drawn) > 20


@pytest.mark.parametrize("shape", evidence.SHAPES)
def test_outlines_have_about_one_area(shape):
    points = np.array([(r * math.cos(a), r * math.sin(a)) for r, a in evidence._outline(shape)])
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert 1.3 < area < 3.6  # a disc's is 3.1


def test_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "TRAIN", 64)
    monkeypatch.setattr(evidence, "TEST", 24)
    tiny = {
        "model": "mae",
        "model_args": TINY,
        "lr": 1e-3,
        "batch_size": 8,
        "img_size": 16,
        "patch_size": 4,
        "steps": 5,
    }
    monkeypatch.setattr(evidence, "RUNS", {"shapes/vit": tiny, "digits/vit": {**tiny, "grey": True}})
    output = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["evidence", "--seeds", "2", "--output", str(output), "--only", "shapes/vit"])
    assert evidence.main() == 0
    assert [path.name for path in output.iterdir()] == ["shapes-vit-cpu.json"]
    document = json.loads((output / "shapes-vit-cpu.json").read_text())
    assert document["environment"]["kind"] == "cpu"
    assert [(entry["run"], entry["seed"]) for entry in document["records"]] == [("shapes/vit", 0), ("shapes/vit", 1)]
    first, second = document["records"]
    assert first["probes"].keys() == {"shape", "colour", "place"}
    assert "pixels" in first["probes"]["shape"]
    assert "pixels" not in second["probes"]["shape"]
    assert [step for step, _ in first["knn_on_the_way"]] == [0, 1, 2, 3, 4, 5]
    assert first["probes"]["shape"]["pre-trained"]["knn"]["count"] == 24
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| shapes/vit")]
    assert len(rows) == 9


def test_digits(tmp_path):
    evidence.write_digits(tmp_path)
    for part, count in (("train", 1437), ("test", 360)):
        with open(tmp_path / f"{part}-digit.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count == len(list((tmp_path / part).glob("*.png")))
        assert {row["label"] for row in rows} == set("0123456789")
