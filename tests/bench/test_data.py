"""`maefast.bench.data`: every loader goes through all files."""

from __future__ import annotations

import importlib.util
import sys

import pytest

pytest.importorskip("PIL")
pytest.importorskip("simplejpeg")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from maefast.bench.data import write_files

    folder = tmp_path_factory.mktemp("photos")
    return folder, write_files(folder, 3)


def test_all_sides_run(files):
    from maefast.bench.data import sides

    timed = sides(*files)
    assert ("datasets" in timed) == (importlib.util.find_spec("datasets") is not None)
    for run in timed.values():
        run()


def test_datasets_as_the_transforms_on_pillows_images(files):
    pytest.importorskip("datasets")
    import torch

    from maefast.bench.data import _datasets

    seen = []
    side = _datasets(files[1], lambda image: seen.append(image.size) or torch.zeros(3, 4, 5))
    (batch,) = side["datasets"]()
    assert batch.shape == (3, 3, 4, 5)
    assert seen == [(500, 375)] * 3


def test_without_datasets_it_says_so(files, monkeypatch, capsys):
    from maefast.bench.data import _datasets

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _datasets(files[1], None) == {}
    assert "datasets: not installed" in capsys.readouterr().out
