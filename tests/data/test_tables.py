"""Columns of images and of paths in Parquet and Arrow, as Hugging Face's `datasets` writes them and others do."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest

from maefast.data import tables
from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder
from maefast.errors import BadImage, ConfigError
from maefast.train import pretrain
from tests.data.sources import encoded, goes_on_when_killed, write_images
from tests.train.common import in_two_parts, losses, tiny_config

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def options(column=None, skip_bad=False):
    return SimpleNamespace(column=column, skip_bad=skip_bad)


def table(numbers, kind="struct", extra=True, broken=()):
    data = [b"broken" if i in broken else encoded(i) for i in numbers]
    if kind == "struct":
        image = pa.array([{"bytes": part, "path": f"{i}.png"} for i, part in zip(numbers, data)], STRUCT)
    else:
        image = pa.array(data, pa.large_binary() if kind == "large" else pa.binary())
    more = {"label": pa.array([1] * len(data)), "caption": pa.array(["a cat"] * len(data))} if extra else {}
    return pa.table({**more, "image": image})


def write_arrow(path, content, rows=2, kind="stream"):
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=rows)


def write_saved(folder, **more):
    """As Dataset.save_to_disk leaves it."""
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        write_arrow(folder / f"data-0000{shard}-of-00002.arrow", table(numbers, **more))
    names = [{"filename": f"data-0000{shard}-of-00002.arrow"} for shard in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    (folder / "dataset_info.json").write_text("{}")
    write_arrow(folder / "cache-0123456789abcdef.arrow", pa.table({"indices": [1, 2]}))
    return folder


def write_parquet(folder, **more):
    """As in a data set's repository."""
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        pq.write_table(table(numbers, **more), folder / "data" / f"train-0000{shard}-of-00002.parquet")
    pq.write_table(table(range(20, 22)), folder / "data" / "test-00000-of-00001.parquet")
    return folder


WRITERS = {"arrow": write_saved, "parquet": write_parquet}


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
@pytest.mark.parametrize("layout", ["arrow", "parquet"])
def test_images_of_a_folder(tmp_path, layout, kind):
    images = find_images(WRITERS[layout](tmp_path / "set", kind=kind), options=options())
    assert [images.path(i).read() for i in range(len(images))] == [encoded(i) for i in range(10)]
    copy = pickle.loads(pickle.dumps(images))
    assert copy.path(9).read() == encoded(9)
    assert copy.fingerprint() == images.fingerprint()
    shown, inner = str(images.path(7)), "/7.png" if kind == "struct" else ""
    assert shown.endswith(f"-00001-of-00002.{layout}[2]{inner}")
    assert images.name(7) == (inner[1:] or shown.rpartition("/")[2])
    with pytest.raises(IndexError):
        images.path(10)


def test_splits_of_a_saved_dictionary(tmp_path):
    write_saved(tmp_path / "set" / "train")
    write_arrow(tmp_path / "set" / "test" / "data-00000-of-00001.arrow", table(range(3)))
    images = find_images(tmp_path / "set")
    assert len(images) == 10
    assert "only the split for training is taken; left out 1 file(s), such as test/data-" in images.notes[-1]
    assert len(find_images(tmp_path / "set" / "test")) == 3
    assert len(find_images(f"{tmp_path}/set/test/*.arrow")) == 3


def test_arrow_in_its_other_format(tmp_path):
    write_arrow(tmp_path / "x.arrow", table(range(5)), kind="file")
    images = find_images(tmp_path / "x.arrow")
    assert [images.path(i).read() for i in range(5)] == [encoded(i) for i in range(5)]


def test_parquet_is_written_once_by_rows(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 2)
    folder = write_parquet(tmp_path / "set")
    first = find_images(folder)
    assert "written once into" in first.notes[0]
    made = sorted(cache.glob("tables/*.arrow"))
    assert len(made) == 2
    again = find_images(folder)
    assert not any("written once" in note for note in again.notes)
    pq.write_table(table(range(30, 33)), folder / "data" / "train-00001-of-00002.parquet")
    changed = find_images(folder)
    assert [changed.path(i).read() for i in range(5, 8)] == [encoded(i) for i in range(30, 33)]
    assert changed.fingerprint() != first.fingerprint()
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "set" / "dataset_card"))
    (tmp_path / "set" / "dataset_card").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be written into the cache: .*\$MAEFAST_CACHE names another"):
        find_images(folder)


def test_remote_parquet(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    write_parquet(tmp_path / "set")
    for path in (tmp_path / "set" / "data").iterdir():
        fsspec.filesystem("memory").pipe_file(f"/tables/{path.name}", path.read_bytes())
    for data in ("memory://tables", "memory://tables/train-*.parquet", f"file://{tmp_path}/set"):
        images = find_images(data, options=options())
        assert [images.path(i).read() for i in range(10)] == [encoded(i) for i in range(10)]
    with pytest.raises(ConfigError, match="must be local"):
        find_images("memory://tables/x.arrow", options=options())


@pytest.mark.parametrize("layout", ["arrow", "parquet"])
def test_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch, layout):
    data = WRITERS[layout](tmp_path / "set")
    pretrain(tiny_config(data, tmp_path / "whole", workers=1))
    in_two_parts(tiny_config(data, tmp_path / "parts"), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    write_images(tmp_path / "pictures")
    pretrain(tiny_config(tmp_path / "pictures", tmp_path / "files"))
    assert losses(tmp_path / "files") == losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_is_killed(tmp_path, step):
    config = tiny_config(write_parquet(tmp_path / "set"), tmp_path / "whole", save_every=1, workers=1)
    goes_on_when_killed(config, tmp_path / "out", step)


def test_paths_in_a_column(tmp_path):
    paths = write_images(tmp_path / "pictures")
    names = pa.array([f"pictures/{path.name}" for path in paths])
    pq.write_table(pa.table({"label": [1] * 10, "name": names, "other": names}), tmp_path / "list.parquet")
    with pytest.raises(ConfigError, match=r"--column NAME must say .* 'label', 'name', 'other'"):
        find_images(tmp_path / "list.parquet", options=options())
    images = find_images(tmp_path / "list.parquet", options=options("name"))
    assert [images.path(i).read_bytes() for i in range(10)] == [encoded(i) for i in range(10)]
    structs = pa.array([{"bytes": None, "path": f"pictures/{path.name}"} for path in paths], STRUCT)
    write_arrow(tmp_path / "list.arrow", pa.table({"image": structs}))  # images that were not embedded
    images = find_images(tmp_path / "list.arrow")
    assert [images.path(i).read_bytes() for i in range(10)] == [encoded(i) for i in range(10)]


def test_tables_that_are_broken(tmp_path):
    folder = write_saved(tmp_path / "set")
    place = folder / "data-00001-of-00002.arrow"
    whole = place.read_bytes()
    for size, words in ((len(whole) - 8, "its end mark is missing"), (len(whole) - 300, "Invalid|OSError"), (100, "")):
        place.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"cannot read the table .*00001-of-00002\.arrow: .*{words}"):
            find_images(folder, options=options())
        lax = find_images(folder, options=options(skip_bad=True))
        assert [lax.path(i).read() for i in range(len(lax))] == [encoded(i) for i in range(len(lax))]
        assert len(lax) >= 5
        assert any("whole rows of it are taken" in note for note in lax.notes)
    assert len(lax) == 5
    pq.write_table(table(range(5)), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"cannot read the table .*x\.parquet: ArrowInvalid"):
        find_images(tmp_path / "x.parquet", options=options())
    with pytest.raises(ConfigError, match=r"nothere\.parquet: no such file"):
        find_images(tmp_path / "nothere.parquet", options=options())
    with pytest.raises(ConfigError, match="no rows"):
        find_images(tmp_path / "x.parquet", options=options(skip_bad=True))


def test_a_cache_that_is_emptied(tmp_path, cache):
    images = find_images(write_parquet(tmp_path / "set"))
    for path in cache.glob("tables/*.arrow"):
        path.unlink()
    with pytest.raises(BadImage, match=r"00001-of-00002\.parquet\[4\]: .*No such file|\.arrow"):
        Decoder()(images.path(9))


def test_jpeg_without_a_name(tmp_path):
    """Bytes are decoded as files are, whatever they are called."""
    data = [encoded(i, "JPEG") for i in range(10)]
    write_arrow(tmp_path / "x.arrow", pa.table({"image": pa.array(data, pa.binary())}))
    (tmp_path / "files").mkdir()
    for index, part in enumerate(data):
        (tmp_path / "files" / f"{index}.jpg").write_bytes(part)
    for name in ("x.arrow", "files"):
        pretrain(tiny_config(tmp_path / name, tmp_path / f"out-{name}", steps=4))
    assert losses(tmp_path / "out-x.arrow") == losses(tmp_path / "out-files")


def test_columns_that_do_not_fit(tmp_path):
    both = table(range(2)).append_column("second", table(range(2)).column("image"))
    pq.write_table(both, tmp_path / "x.parquet")
    assert len(find_images(tmp_path / "x.parquet", options=options("second"))) == 2
    assert len(find_images(tmp_path / "x.parquet", options=options())) == 2  # "image" is a usual name
    for column, match in (("third", "no column 'third'; its columns"), ("label", "neither bytes nor paths")):
        with pytest.raises(ConfigError, match=match):
            find_images(tmp_path / "x.parquet", options=options(column))
    renamed = both.rename_columns(["label", "caption", "first", "second"])
    pq.write_table(renamed, tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="--column NAME must say"):
        find_images(tmp_path / "x.parquet", options=options())


def test_a_broken_value(tmp_path):
    pq.write_table(table(range(10), broken=[3]), tmp_path / "x.parquet")
    with pytest.raises(BadImage, match=r"cannot read image .*x\.parquet\[3\]/3\.png: .*--skip-bad"):
        pretrain(tiny_config(tmp_path / "x.parquet", tmp_path / "strict"))
    result = pretrain(tiny_config(tmp_path / "x.parquet", tmp_path / "lax", skip_bad=True))
    assert result.step == 12
    assert [name.rpartition("/set")[2] for name in result.bad] == [f"{tmp_path}/x.parquet[3]/3.png"]
    empty = pa.table({"image": pa.array([{"bytes": encoded(1), "path": None}, None], STRUCT)})
    write_arrow(tmp_path / "x.arrow", empty)
    images = find_images(tmp_path / "x.arrow")
    assert images.path(0).read() == encoded(1)
    with pytest.raises(ValueError, match="nothing in its row"):
        images.path(1).read()
