from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast.data.collection import DEMO
from maefast.data.embeddings import EmbeddingBatch, Embeddings, read_sequence
from maefast.errors import BadFile, ConfigError
from maefast.train import PretrainConfig

WANTS = Embeddings(length=6, dim=3, shortest=2)


def opened(wants, folder):
    return wants.open(PretrainConfig(data=str(folder)))


def test_windows_of_sequences():
    raw = np.arange(30, dtype=np.float32).reshape(10, 3)
    seen = [WANTS.sample(raw, np.random.default_rng(seed)) for seed in range(200)]
    assert {len(sample) for sample in seen} == {2, 3, 4, 5, 6}
    assert {int(sample[0, 0]) // 3 for sample in seen} == set(range(9))
    for sample in seen:
        assert (np.diff(sample[:, 0]) == 3).all()
    assert {len(WANTS.sample(raw[:1], np.random.default_rng(seed))) for seed in range(9)} == {1}
    np.testing.assert_array_equal(WANTS.example(raw), raw[:6])
    batch = WANTS.collate([raw[:2], raw[4:10]], np.array([8, 9]))
    assert batch.values.shape == (2, 6, 3)
    assert batch.lengths.tolist() == [2, 6]
    assert batch.key.tolist() == [8, 9]
    np.testing.assert_array_equal(batch.values[1], raw[4:10])
    assert not batch.values[0, 2:].any()
    WANTS.check(batch)
    assert WANTS.check(batch.to("cpu")) is None


def test_folders_of_sequences(tmp_path):
    for name, count in (("a", 4), ("b", 9)):
        np.save(tmp_path / f"{name}.npy", np.ones((count, 3)))
    batch, names = opened(WANTS, tmp_path).examples(2)
    assert batch.lengths.tolist() == [4, 6]
    assert batch.values.dtype is torch.float32
    assert names == ["a.npy", "b.npy"]


def test_the_demo_is_smooth_and_the_same_every_time():
    wants = Embeddings(length=32, dim=192)
    source = opened(wants, DEMO)
    one, other = source.entries[0], opened(wants, DEMO).entries[0]
    assert one.shape == (64, 192)
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, source.entries[1])
    unit = one / np.linalg.norm(one, axis=1, keepdims=True)
    assert (unit[1:] * unit[:-1]).sum(1).mean() > (unit[32:] * unit[:32]).sum(1).mean() + 0.1
    with pytest.raises(ConfigError, match="the demo's embeddings have 192 values, not 3"):
        opened(WANTS, DEMO)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no sequences"):
        opened(WANTS, tmp_path)
    for name, array, reason in (
        ("wide", np.zeros((5, 4)), r"floating \[n, 3\], not float64 \[5, 4\]"),
        ("whole", np.zeros((5, 3), int), "not int64"),
        ("none", np.zeros((0, 3)), r"\[0, 3\]"),
        ("nan", np.full((5, 3), np.nan), "not finite"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=reason):
            read_sequence(tmp_path / f"{name}.npy", 3)
    with pytest.raises(BadFile, match=r"nan\.npy: the sequence holds"):
        opened(WANTS, tmp_path).examples(4)
    for lengths, error, reason in (
        ([1, 2], TypeError, "numpy array of ints"),
        (np.array([1.0, 2.0]), TypeError, "not|got float64"),
        (np.array([1]), ValueError, r"2 numbers in \[1, 6\], got \[1\]"),
        (np.array([0, 2]), ValueError, r"in \[1, 6\], got \[0 2\]"),
        (np.array([7, 2]), ValueError, r"in \[1, 6\], got \[7 2\]"),
    ):
        with pytest.raises(error, match=reason):
            WANTS.check(EmbeddingBatch(torch.zeros(2, 6, 3), lengths))
    with pytest.raises(ValueError, match=r"values must be \[B, 6, 3\], got \(2, 5, 3\)"):
        WANTS.check(EmbeddingBatch(torch.zeros(2, 5, 3), np.array([1, 2])))
    with pytest.raises(TypeError, match="an EmbeddingBatch is wanted"):
        WANTS.check(torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match="shortest must be at most the length 6, got 7"):
        Embeddings(6, 3, 7)
