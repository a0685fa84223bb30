"""Members of tars: the index, broken tars, exact resume, remote ones."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from maefast.data import remote, tar_index
from maefast.data.images.files import EXTENSIONS, find_images
from maefast.data.images.pixels import Decoder
from maefast.data.records import open_records
from maefast.errors import BadFile, BadImage, ConfigError, TrainError, Unreachable
from maefast.train import checkpoint, pretrain
from tests.data.sources import encoded, goes_on_when_killed, write_images, write_shards, write_tar
from tests.train import victims
from tests.train.common import in_two_parts, losses, rows, run_together, tiny_config

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def options(column=None, skip_bad=False):
    return SimpleNamespace(column=column, skip_bad=skip_bad)


def upload(folder, name):
    """The files of a folder, in memory under a name of its own."""
    system = fsspec.filesystem("memory")
    for path in sorted(folder.glob("*.tar")):
        system.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


def test_members_of_shards(shards):
    for data in (shards, f"{shards}/{{0000..0001}}.tar", f"{shards}/*.tar"):
        images = find_images(data, options=options())
        assert len(images) == 10
        assert [images.path(i).read() for i in range(10)] == [encoded(i) for i in range(10)]
        assert images.name(7) == "0001.tar/000007.png"
        assert str(images.path(7)).endswith("/shards/0001.tar/000007.png")
        with pytest.raises(IndexError):
            images.path(10)
    copy = pickle.loads(pickle.dumps(images))  # for processes that are not forked
    assert copy.path(9).read() == encoded(9)
    assert copy.fingerprint() == images.fingerprint() != find_images(shards / "0000.tar").fingerprint()


def test_names_of_any_length_and_kind(tmp_path):
    names = ["a" * 200 + ".png", "ä/日本.png", "b.v2.png", "._b.png", "x/" * 60 + "c.PNG", "d.txt"]
    write_tar(tmp_path / "x.tar", ((name, encoded(i)) for i, name in enumerate(names)))
    (tmp_path / "x.tar").touch()
    for _ in range(2):  # without an index, and with it
        images = find_images(tmp_path / "x.tar")
        assert list(images.names) == [names[0], names[1], names[2], names[4]]
        assert images.path(3).read() == encoded(4)


def test_the_index_is_made_once(shards, cache, monkeypatch):
    calls = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda *arguments: calls.append(1) or scan(*arguments))
    first = find_images(shards)
    assert sorted(path.name for path in shards.glob("*.npz")) == ["0000.tar.index.npz", "0001.tar.index.npz"]
    assert "0000.tar.index.npz and 1 more" in first.notes[0]
    assert not cache.exists()
    again = find_images(shards)
    assert (len(calls), again.notes) == (2, [])
    assert again.names == first.names
    assert np.array_equal(again.offsets, first.offsets)
    write_tar(shards / "0000.tar", [("z.png", encoded(3))])  # another tar, another index
    assert list(find_images(shards / "0000.tar").names) == ["z.png"]
    (shards / "0001.tar.index.npz").write_bytes(b"broken")
    assert find_images(shards / "0001.tar").names == first.names[5:]
    assert len(calls) == 4


def test_the_index_of_a_folder_that_is_not_writable(shards, cache, monkeypatch):
    def save(path, *rest):
        if path.parent == shards:
            raise PermissionError(path)
        original(path, *rest)

    original = tar_index._save
    monkeypatch.setattr(tar_index, "_save", save)
    assert len(find_images(shards)) == 10
    assert len(list(cache.glob("tars/*.npz"))) == 2
    assert not list(shards.glob("*.npz"))
    assert find_images(shards).notes == []
    monkeypatch.setattr(tar_index, "_save", lambda *_: (_ for _ in ()).throw(PermissionError()))
    shutil.rmtree(cache)
    assert len(find_images(shards)) == 10  # nowhere


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_bit_for_bit(shards, tmp_path, monkeypatch, workers):
    pretrain(tiny_config(shards, tmp_path / "whole", workers=workers))
    in_two_parts(tiny_config(shards, tmp_path / "parts", workers=workers), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    write_images(tmp_path / "pictures")
    pretrain(tiny_config(tmp_path / "pictures", tmp_path / "files"))
    assert losses(tmp_path / "files") == losses(tmp_path / "whole")  # the same pictures, in the same order


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_run_that_is_killed(shards, tmp_path, step):
    config = tiny_config(shards, tmp_path / "whole", save_every=1, workers=1)
    lost = (shards / "0001.tar.index.npz").unlink  # as if it had been lost too
    goes_on_when_killed(config, tmp_path / "out", step, lost)


def test_several_images_of_a_sample(tmp_path):
    members = ((f"{i}.{ending}", encoded(i + len(ending))) for i in range(3) for ending in ("jpg", "seg.png", "txt"))
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ConfigError, match=r"such as 0\.seg\.png; --column says .* jpg, seg\.png, or '\*' for all"):
        find_images(tar)
    for column, count, size in (("jpg", 3, 3), (".SEG.PNG", 3, 7), ("*", 6, 3)):
        images = find_images(tar, options=options(column))
        assert len(images) == count
        assert images.path(0).read() == encoded(size)
    with pytest.raises(ConfigError, match=r"no member that ends in \.webp in 1 tar"):
        find_images(tar, options=options("webp"))
    with pytest.raises(ConfigError, match=r"no member with an ending of .*none of its 9 members is wanted"):
        open_records(tar, (".wav",), options())


def test_tars_that_are_cut_off(shards, tmp_path, monkeypatch):
    whole = (shards / "0001.tar").read_bytes()
    images = find_images(shards)
    inside = int(images.offsets[7]) + 5  # of 000007.png
    header = int(images.offsets[7]) - 200
    for size, found, words in (
        (inside, 2, r"cut off within the member 000007\.png, behind 000006\.json"),
        (header, 2, r"behind 000006\.json"),
        (int(images.offsets[7]) - 512, 2, r"its end mark is missing, behind 000006\.json"),
        (0, 0, "it is empty"),
    ):
        (shards / "0001.tar").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"cannot read the tar .*0001\.tar: .*{words}.*--skip-bad"):
            find_images(shards, options=options())
        lax = find_images(shards, options=options(skip_bad=True))
        assert len(lax) == 5 + found
        assert any("0001.tar" in note and "are taken" in note for note in lax.notes)
    (shards / "0001.tar").write_bytes(whole[:inside])
    result = pretrain(tiny_config(shards, tmp_path / "out", skip_bad=True))
    assert (result.step, result.bad) == (12, {})


def test_tars_that_were_joined_by_cat(shards):
    """What lies behind the first one's end is told each time, also by the stored index."""
    first, second = shards / "0000.tar", shards / "0001.tar"
    with open(first, "ab") as file:
        file.write(second.read_bytes())
    for _ in range(2):
        images = find_images(shards, options=options())
        assert len(images) == 10
        (note,) = [note for note in images.notes if "end mark" in note]
        assert note.startswith(f"warning: {first}: what follows its end mark is left out")


def test_what_is_no_tar(shards, tmp_path):
    (tmp_path / "x.tar").write_bytes(gzip.compress((shards / "0000.tar").read_bytes()))
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    damaged = bytearray((shards / "0001.tar").read_bytes())
    damaged[find_images(shards).offsets[6] - 512 + 3] ^= 255  # in the header of 000006.png
    (tmp_path / "z.tar").write_bytes(damaged)
    for data, match in (
        (tmp_path / "x.tar", r"compressed \(gzip\)"),
        (tmp_path / "x.tar.gz", "unpack it to a plain .tar"),
        (tmp_path / "y.tar", "cannot read the tar"),
        (tmp_path / "z.tar", r"no header of a member at byte \d+, behind 000005\.json"),
        (tmp_path / "none.tar", "no such file"),
        (f"{shards}/{{0000..0002}}.tar", r"0002\.tar: no such file"),
    ):
        with pytest.raises(ConfigError, match=match):
            find_images(data, options=options())
    assert len(find_images(f"{shards}/{{0000..0002}}.tar", options=options(skip_bad=True))) == 10


def test_a_broken_member(tmp_path):
    """Named with its tar; skipped and counted, or a stop after which the run can go on."""
    members = [(f"{i}.png", encoded(i) if i != 3 else b"broken") for i in range(10)]
    tar = write_tar(tmp_path / "x.tar", members)
    config = tiny_config(tar, tmp_path / "out", save_every=100)
    with pytest.raises(BadImage, match=r"cannot read image .*x\.tar/3\.png: .*--skip-bad"):
        pretrain(config)
    result = pretrain(tiny_config(tar, tmp_path / "lax", skip_bad=True))
    assert result.step == 12
    assert list(result.bad) == [f"{tar}/3.png"]
    write_tar(tar, [(name, encoded(3) if data == b"broken" else data) for name, data in members])
    pretrain(config)
    assert len(rows(tmp_path / "out")) == 12


def test_a_tar_that_shrinks_while_it_is_read(shards):
    images = find_images(shards)
    os.truncate(shards / "0001.tar", int(images.offsets[9]) + 10)
    with pytest.raises(BadImage, match=r"0001\.tar/000009\.png: ValueError: 10 of its \d+ bytes are there"):
        Decoder()(images.path(9))


# --- remote -------------------------------------------------------------------------------------------------


def test_remote_tars_are_the_same(shards, tmp_path, cache):
    folder = upload(shards, "same")
    local = find_images(shards)
    for data in (folder, f"{folder}/{{0000..0001}}.tar", f"{folder}/*.tar", f"file://{shards}"):
        images = find_images(data, options=options())
        assert [images.path(i).read() for i in range(10)] == [encoded(i) for i in range(10)]
        assert images.fingerprint() == local.fingerprint()
    assert list(cache.glob("tars/*.npz"))
    pretrain(tiny_config(shards, tmp_path / "local"))
    for number, data in enumerate((f"{folder}/{{0000..0001}}.tar", f"file://{shards}")):
        pretrain(tiny_config(data, tmp_path / f"remote{number}", workers=1))
        assert losses(tmp_path / f"remote{number}") == losses(tmp_path / "local")


def test_a_remote_run_goes_on_bit_for_bit(shards, tmp_path, monkeypatch):
    data = f"{upload(shards, 'on')}/*.tar"
    pretrain(tiny_config(data, tmp_path / "whole"))
    in_two_parts(tiny_config(data, tmp_path / "parts"), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_large_remote_tars_are_gone_through_in_blocks(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(300_000)
    tar = write_tar(tmp_path / "x.tar", ((f"{i}.bin", data) for i in range(8)))
    monkeypatch.setattr(remote, "BLOCK", 4096)
    images = open_records(f"file://{tar}", (".bin",))
    assert images.path(7).read() == data
    local = open_records(tar, (".bin",))
    assert np.array_equal(images.offsets, local.offsets)


def failing(monkeypatch, times, seconds=0.0):
    """The file system in memory fails that often; the list of what was asked for."""
    from fsspec.implementations.memory import MemoryFileSystem

    calls, original = [], MemoryFileSystem.cat_file

    def cat_file(self, path, *arguments, **more):
        calls.append(path)
        if len(calls) <= times:
            time.sleep(seconds)
            raise OSError("connection reset")
        return original(self, path, *arguments, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return calls


def test_what_fails_is_asked_for_again(shards, monkeypatch):
    images = find_images(upload(shards, "again"))
    calls = failing(monkeypatch, 3)
    assert images.path(0).read() == encoded(0)
    assert len(calls) == 4


def test_what_gives_no_answer(shards, monkeypatch):
    folder = upload(shards, "silent")
    images = find_images(folder)
    failing(monkeypatch, 10**6)
    with pytest.raises(Unreachable, match=r"0000\.tar: no answer in 4 attempts .*OSError: connection reset"):
        Decoder()(images.path(0))
    monkeypatch.setenv("MAEFAST_REMOTE_TIMEOUT", "0.05")
    monkeypatch.setenv("MAEFAST_REMOTE_ATTEMPTS", "2")
    failing(monkeypatch, 10**6, seconds=12)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"in 2 attempts of up to 0\.05 s: TimeoutError"):
        images.path(0).read()
    assert time.monotonic() - began < 10
    with pytest.raises(TrainError, match="no answer"):  # before a run starts
        find_images(upload(shards, "silent2"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_store_goes_away(shards, tmp_path, monkeypatch, workers):
    """It saves and stops, with --skip-bad too: what gives no answer is not bad data."""
    folder = upload(shards, f"away{workers}")
    config = tiny_config(f"{folder}/*.tar", tmp_path / "whole", cache_mb=0, save_every=100, skip_bad=True)
    pretrain(config)
    config.output_dir, config.workers = str(tmp_path / "out"), workers
    with monkeypatch.context() as patch:
        from maefast.data import tars

        read, calls = remote.read, []

        def read_some(*arguments):
            calls.append(1)
            if len(calls) > 30:
                raise Unreachable(arguments[0], f"{Unreachable.START} in 1 attempt")
            return read(*arguments)

        patch.setattr(tars.remote, "read", read_some)
        with pytest.raises(Unreachable, match=r"memory:/+away.*no answer .*the same command goes on from here"):
            pretrain(config)
    assert checkpoint.latest(tmp_path / "out" / "checkpoints")[0] is not None
    pretrain(config)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_remote_things_that_are_not_there(tmp_path):
    for data, match in (
        ("memory://nothing/x.tar", "no such file"),
        ("memory://nothing/*.tar", "no file has such a name"),
        ("memory://nothing", "no such folder, or nothing in it"),
        ("nosuch://bucket/x.tar", "cannot be read: Protocol not known"),
    ):
        with pytest.raises(ConfigError, match=match):
            find_images(data, options=options())


def test_other_data_than_images(tmp_path):
    """Members are arrays for a recipe that learns from arrays."""
    from maefast.data.arrays import load_array
    from maefast.data.collection import Files

    def array(value):
        file = (tmp_path / "x.npy").open("wb+")
        with file:
            np.save(file, np.full(3, value))
        return (tmp_path / "x.npy").read_bytes()

    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "x.tar", [("0.npy", array(1)), ("1.npy", b"broken"), ("1.txt", b"")])
    files = Files(tmp_path / "tars", (".npy",), load_array, "arrays", options())
    assert [files.label(i) for i in range(len(files))] == ["x.tar/0.npy", "x.tar/1.npy"]
    assert files[0].tolist() == [1, 1, 1]
    with pytest.raises(BadFile, match=r"x\.tar/1\.npy"):
        files[1]


def test_tars_beside_images(shards):
    """A folder is one thing; what is left out is said."""
    write_images(shards, 3)
    images = find_images(shards)
    assert len(images) == 3
    assert "left out 2 tar(s) or table(s) that lie beside images, such as 0000.tar" in images.notes[0]
    assert len(find_images(f"{shards}/*.tar")) == 10


def test_endings_are_those_of_images():
    assert ".png" in EXTENSIONS
    assert ".tar" not in EXTENSIONS


def test_two_processes_share_the_stream(shards, tmp_path):
    """Both make, or find, the index; together they see what one process sees."""
    (tmp_path / "one").mkdir()
    pretrain(tiny_config(shards, tmp_path / "one" / "out", batch_size=4))
    for path in shards.glob("*.npz"):
        path.unlink()
    (tmp_path / "two").mkdir()
    assert run_together(victims.train_as, 2, tiny_config(shards, tmp_path / "two" / "out", batch_size=2)) == [0, 0]
    one, two = (np.array([float(row["loss"]) for row in rows(tmp_path / name / "out")]) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(list(shards.iterdir())) == 4


def test_packages_that_are_not_there(shards, tmp_path, monkeypatch):
    """Named with the extra that they come in; tars on a disk need none."""
    from maefast.data.channel_files import read_channels
    from maefast.data.points import read_cloud
    from maefast.data.video_files import CodedVideo

    for name in ("fsspec", "pyarrow", "tifffile", "trimesh", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    for ending in ("parquet", "tif", "off", "mp4"):
        (tmp_path / f"x.{ending}").write_bytes(b"")
    assert len(find_images(shards)) == 10
    for name, call in (
        ("fsspec", lambda: find_images("s3://bucket/x.tar")),
        ("pyarrow", lambda: find_images(tmp_path / "x.parquet")),
        ("tifffile", lambda: read_channels(tmp_path / "x.tif", 2)),
        ("trimesh", lambda: read_cloud(tmp_path / "x.off")),
        ("av", lambda: CodedVideo(tmp_path / "x.mp4")),
    ):
        with pytest.raises(TrainError, match=rf"'{name}': pip install \"maefast\[data\]\""):
            call()
