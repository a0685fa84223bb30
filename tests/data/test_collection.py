"""Samples that are read one by one, as a run's data."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maefast.data.collection import Collection, Files, Made
from maefast.errors import BadFile, ConfigError, TrainError
from maefast.recipe import Batch


@dataclass
class NumberBatch(Batch):
    values: torch.Tensor


class Numbers:
    unit = "number"

    def sample(self, raw, rng):
        if raw < 0:
            raise ValueError("it is negative")
        return raw + rng.random()

    def example(self, raw):
        return self.sample(raw, np.random.default_rng(0))

    def collate(self, samples, key):
        return NumberBatch(torch.tensor(samples), key=key)


def collection(values, skip_bad=False, seed=0):
    made = Made("numbers", len(values), lambda index: values[index], lambda index: f"n{index}")
    return Collection(Numbers(), made, SimpleNamespace(seed=seed, skip_bad=skip_bad))


def test_samples_are_functions_of_their_place():
    one, two = collection([1.0, 2.0]), collection([1.0, 2.0])
    assert one[5, 1, 0] == two[5, 1, 0]
    assert one[5, 1, 0][0] != one[5, 2, 0][0]  # another epoch
    assert one[5, 1, 0][0] == one[6, 1, 0][0]
    assert collection([1.0, 2.0], seed=1)[5, 1, 0] != one[5, 1, 0]
    batch, bad = one.collate([one[7, 0, 0], one[8, 0, 1]])
    assert (batch.key.tolist(), bad, len(batch)) == ([7, 8], [], 2)


def test_bad_samples_stop_or_are_skipped():
    strict, lax = collection([1.0, -1.0]), collection([1.0, -1.0], skip_bad=True)
    batch, bad = strict.collate([strict[0, 0, 0], strict[1, 0, 1]])
    assert batch is None
    assert bad == [("n1", "it is negative")]
    with pytest.raises(BadFile, match=r"cannot read n1: it is negative \(--skip-bad"):
        raise strict.failure(bad)
    made, position, bad = lax[1, 0, 1]
    assert 1 <= made < 2
    assert (position, bad) == (1, [("n1", "it is negative")])
    none = collection([-1.0, -2.0], skip_bad=True)
    batch, bad = none.collate([none[0, 0, 0]])
    assert batch is None
    assert isinstance(none.failure(bad), TrainError)
    with pytest.raises(TrainError, match="none of the 2 numbers can be read"):
        none.examples(1)


def test_skipping_is_advised_only_where_something_is_left():
    bad = [("n1", "it is negative")]
    for values, message in (
        ([1.0, -1.0], "--skip-bad counts and skips such files"),
        ([-1.0], "it is the only number"),
        ([-1.0] * 3, "none of the 3 numbers can be read: look at --data"),
        ([-1.0] * 40, "none of 12 numbers that were tried can be read, so --skip-bad would leave few or none"),
    ):
        assert str(collection(values).failure(bad)) == f"cannot read n1: it is negative ({message})"
    with pytest.raises(BadFile, match="none of the 2 numbers"):
        collection([-1.0, -1.0]).examples(1)
    with pytest.raises(TrainError, match="the only number cannot be read: n0: it is negative"):
        collection([-1.0], skip_bad=True).examples(1)


def test_examples_and_what_changed():
    source = collection([1.0, 2.0, 3.0])
    batch, names = source.examples(2)
    assert names == ["n0", "n1"]
    assert batch.key.tolist() == [0, 1]
    record = source.record()
    assert source.changes(record) == []
    assert collection([1.0]).changes(record) == ["numbers: 3 -> 1 (the list of them is another)"]


def test_files(tmp_path):
    for name in ("b/2.txt", "a.txt", ".hidden/3.txt", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1.5" if name != "b/2.txt" else "x")
    files = Files(tmp_path, (".txt",), lambda path: float(path.read_text()), "numbers")
    assert [files.label(index) for index in range(len(files))] == ["a.txt", "b/2.txt"]
    assert files[0] == 1.5
    with pytest.raises(BadFile, match="could not convert"):
        files[1]
    with pytest.raises(ConfigError, match="no such folder"):
        Files(tmp_path / "none", (".txt",), float, "numbers")
    with pytest.raises(ConfigError, match=r"no numbers in it \(looked at any depth for \.csv\)"):
        Files(tmp_path, (".csv",), float, "numbers")
