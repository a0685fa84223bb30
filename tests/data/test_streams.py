"""Records of shards that are read front to back: each once an epoch, from any place on, and what is broken."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest

from maefast.data import remote
from maefast.data.records import on_the_hub, open_records
from maefast.data.streams import Stream
from maefast.errors import BadFile, ConfigError, Unreachable
from tests.data.sources import encoded, write_shards, write_tar

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)


def options(column=None, skip_bad=False, shuffle=4):
    return SimpleNamespace(column=column, skip_bad=skip_bad, shuffle=shuffle, stream=True)


def opened(data, **more):
    return open_records(str(data), (".png", ".bin"), options(**more))


def write_table(path, first=0, count=10, group=4):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"bytes": b"%d" % i, "path": f"{i}.png"} for i in range(first, first + count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": rows, "label": list(range(count))}), path, row_group_size=group)
    return path


def write_numbers(folder, sizes=(5, 3, 7, 4)):
    """Tars whose members hold their own numbers, among others."""
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        mine = list(itertools.islice(numbers, size))
        members = [(f"{i}.{kind}", b"%d" % i) for i in mine for kind in ("bin", "txt")]
        write_tar(folder / f"{shard}.tar", members)
    return sum(sizes)


def epochs_of(stream, count):
    """The numbers that it gives in its first `count` epochs."""
    found = {epoch: [] for epoch in range(count + 1)}
    while (where := stream.next()) and stream.place.epoch < count:
        found[stream.place.epoch].append(int(where.read()))
    return [found[epoch] for epoch in range(count)]


@pytest.mark.parametrize("streams", [1, 2, 3, 6])
@pytest.mark.parametrize("shuffle", [1, 4, 5, 1000])
def test_every_record_once_an_epoch(tmp_path, streams, shuffle):
    """Also where streams are more than shards, and blocks end where an epoch does."""
    total = write_numbers(tmp_path)
    records = opened(f"{tmp_path}/*.tar", shuffle=shuffle)
    parts = [epochs_of(Stream(records, 7, number, streams), 3) for number in range(streams)]
    for epoch in range(3):
        assert sorted(number for part in parts for number in part[epoch]) == list(range(total))
    assert parts[0][0] != parts[0][1] != parts[0][2]
    assert parts[0] != epochs_of(Stream(records, 8, 0, streams), 3)  # another seed


@pytest.mark.parametrize("streams", [1, 6])
def test_a_stream_goes_on_from_every_place(tmp_path, streams):
    write_numbers(tmp_path)
    records = opened(f"{tmp_path}/*.tar", shuffle=3)
    stream, places, found = Stream(records, 0, 1 % streams, streams), [], []
    for _ in range(45 // streams):
        places.append(stream.place)
        found.append(stream.next().read())
    for start, place in enumerate(places):
        again = Stream(pickle.loads(pickle.dumps(records)), 0, 1 % streams, streams, list(place))
        assert again.place == place
        assert [again.next().read() for _ in found[start:]] == found[start:]


def test_only_so_many_are_held(tmp_path):
    write_numbers(tmp_path, (50,))
    stream = Stream(opened(tmp_path / "0.tar", shuffle=10), 0, 0, 1)
    for _ in range(50):
        stream.next()
        held = [block for block in (stream._block, stream._next) if block is not None]
        assert sum(where is not None for block in held for where in block.held) <= 10


PACKINGS = [(".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.bz2", bz2.compress), (".tar.xz", lzma.compress)]


@pytest.mark.parametrize(("ending", "pack"), [*PACKINGS, (".tar", gzip.compress)])
def test_compressed_tars(tmp_path, ending, pack):
    tar = write_shards(tmp_path / "plain", shards=1, each=10) / "0000.tar"
    data = pack(tar.read_bytes())
    (tmp_path / f"x{ending}").write_bytes(data)
    read = opened(tmp_path / f"x{ending}").read
    assert [where.read() for where in read(str(tmp_path / f"x{ending}"), 0)] == [encoded(i) for i in range(10)]
    assert [str(where) for where in read(str(tmp_path / f"x{ending}"), 8)] == [
        f"{tmp_path}/x{ending}/00000{i}.png" for i in (8, 9)
    ]
    fsspec.filesystem("memory").pipe_file(f"/packed/x{ending}", data)
    url = f"memory://packed/x{ending}"
    assert [where.read() for where in opened(url).read(url, 7)] == [encoded(i) for i in (7, 8, 9)]
    (tmp_path / f"x{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFile, match=rf"x{ending}: "):
        list(read(str(tmp_path / f"x{ending}"), 0))


def test_zstd(tmp_path):
    pa = pytest.importorskip("pyarrow")
    tar = write_shards(tmp_path / "plain", shards=1, each=10) / "0000.tar"
    with pa.CompressedOutputStream(str(tmp_path / "x.tar.zst"), "zstd") as file:
        file.write(tar.read_bytes())
    read = opened(tmp_path / "x.tar.zst").read
    assert [where.read() for where in read(str(tmp_path / "x.tar.zst"), 3)] == [encoded(i) for i in range(3, 10)]
    (tmp_path / "x.tar.zst").write_bytes((tmp_path / "x.tar.zst").read_bytes()[:-200])
    with pytest.raises(BadFile, match=r"x\.tar\.zst: "):
        list(read(str(tmp_path / "x.tar.zst"), 0))


def test_without_the_option_compressed_tars_are_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="--stream reads it front to back"):
        open_records(str(tmp_path / "x.tar.gz"), (".png",), SimpleNamespace(column=None, skip_bad=False))


def test_rows_of_parquet(tmp_path):
    path = str(write_table(tmp_path / "data" / "train-0.parquet"))
    write_table(tmp_path / "data" / "test-0.parquet")
    records = opened(path)
    for start in range(11):
        assert [where.read() for where in records.read(path, start)] == [b"%d" % i for i in range(start, 10)]
    assert records.name(3) == "train-0.parquet[3]/3.png"
    system = fsspec.filesystem("memory")
    for file in (tmp_path / "data").glob("*"):
        system.pipe_file(f"/streamed-tables/{file.name}", file.read_bytes())
    found = opened("memory://streamed-tables")
    assert [shard.replace(":///", "://") for shard in found.shards] == ["memory://streamed-tables/train-0.parquet"]
    assert "only the split for training" in found.notes[-1]
    assert sorted(epochs_of(Stream(found, 0, 0, 1), 1)[0]) == list(range(10))
    with pytest.raises(ConfigError, match=r"no column 'picture'; its columns are 'image', 'label'"):
        opened(path, column="picture")


def test_paths_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"file": ["a/0.png", "a/1.png"]}), tmp_path / "x.parquet")
    records = opened(tmp_path / "x.parquet")
    assert [str(where) for where in records.head] == [f"{tmp_path}/a/{i}.png" for i in range(2)]


def test_the_hub(tmp_path, monkeypatch):
    """Its file system, which another one in memory stands for."""
    from fsspec.implementations.memory import MemoryFileSystem

    assert on_the_hub("hf://me/pictures/data/*.parquet") == "hf://datasets/me/pictures/data/*.parquet"
    assert on_the_hub("hf://datasets/me/pictures") == "hf://datasets/me/pictures"

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    for name, first in (("train-0", 0), ("train-1", 10), ("test-0", 20)):
        table = write_table(tmp_path / f"{name}.parquet", first)
        Hub().pipe_file(f"/datasets/me/pictures/data/{name}.parquet", table.read_bytes())
    for name in ("hf://me/pictures", "hf://datasets/me/pictures", "hf://me/pictures/data/train-*.parquet"):
        assert len(opened(name).shards) == 2
        assert sorted(epochs_of(Stream(opened(name), 0, 0, 1), 1)[0]) == list(range(20))
        indexed = open_records(name, (".png",), SimpleNamespace(column=None, skip_bad=False))
        assert sorted(int(indexed.path(i).read()) for i in range(len(indexed))) == list(range(20))


# --- what is broken -----------------------------------------------------------------------------------------


def test_shards_that_are_cut_off(tmp_path):
    write_numbers(tmp_path, (5, 5))
    whole = (tmp_path / "1.tar").read_bytes()
    for size, words in ((512 * 9, "cut off within the member 7.bin"), (0, "it is empty"), (512 * 8, "end mark")):
        (tmp_path / "1.tar").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"cannot read the shard .*1\.tar: .*{words}.*--skip-bad"):
            opened(f"{tmp_path}/*.tar")
        stream = Stream(opened(f"{tmp_path}/*.tar", skip_bad=True), 0, 0, 1)
        (found,) = epochs_of(stream, 1)
        assert sorted(found) == list(range(7 if size else 5))
        assert stream.bad[0][0].endswith("1.tar")
    damaged = bytearray(whole)
    damaged[512 * 8 + 3] ^= 255
    (tmp_path / "1.tar").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"no header of a member at byte \d+, behind 6\.txt"):
        opened(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_tars_that_were_joined_by_cat(tmp_path, pack):
    """What lies behind the first one's end is told; what cannot be read there is not."""
    write_numbers(tmp_path, (3, 3))
    one, other = (pack((tmp_path / f"{i}.tar").read_bytes()) for i in range(2))
    joined = tmp_path / "x.tar"
    joined.write_bytes(one + other)
    with pytest.warns(UserWarning, match=r"x\.tar: what follows its end mark is left out"):
        assert len(list(opened(joined).read(str(joined), 0))) == 3
    for cut in (-8, len(one)):  # gzip's own end is missing, or nothing
        joined.write_bytes(one[:cut])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(list(opened(joined).read(str(joined), 0))) == 3


def test_a_block_that_is_not_whole_is_not_given(tmp_path):
    """So that, once the shard is mended, the order is that of a run that never met it."""
    write_numbers(tmp_path, (20,))
    whole = (tmp_path / "0.tar").read_bytes()
    records = opened(tmp_path / "0.tar", shuffle=8)
    wanted = epochs_of(Stream(records, 0, 0, 1), 1)[0]
    (tmp_path / "0.tar").write_bytes(whole[: 512 * 4 * 13])
    stream = Stream(records, 0, 0, 1)
    found = [int(stream.next().read()) for _ in range(8)]
    for _ in range(2):
        with pytest.raises(BadFile, match="its end mark is missing"):
            stream.next()
    (tmp_path / "0.tar").write_bytes(whole)
    assert found + epochs_of(Stream(records, 0, 0, 1, stream.place), 1)[0] == wanted


def test_fewer_records_than_streams(tmp_path):
    write_numbers(tmp_path, (2,))
    with pytest.raises(BadFile, match=r"no record for stream 2 of 3 in the 1 shard.*fewer processes"):
        Stream(opened(tmp_path / "0.tar"), 0, 2, 3).next()


def test_no_answer(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    write_numbers(tmp_path, (5,))
    fsspec.filesystem("memory").pipe_file("/away/x.tar.gz", gzip.compress((tmp_path / "0.tar").read_bytes()))
    table = write_table(tmp_path / "x.parquet")
    fsspec.filesystem("memory").pipe_file("/away/x.parquet", table.read_bytes())
    for url in ("memory://away/x.tar.gz", "memory://away/x.parquet"):
        records = opened(url, skip_bad=True)

        def cat_file(*_, **__):
            raise OSError("connection reset")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "cat_file", cat_file)
            with pytest.raises(Unreachable, match="no answer in 4 attempts"):
                Stream(records, 0, 0, 1).next()
    with pytest.raises(ConfigError, match="no such file"):
        opened("memory://away/none.tar")


def test_what_cannot_be_streamed(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.png", b"0"), ("0.bin", b"0")])
    with pytest.raises(ConfigError, match=r"several members of one sample, such as .*0\.bin; --column"):
        opened(tmp_path / "x.tar")
    assert len(opened(tmp_path / "x.tar", column="bin")) == 1
    with pytest.raises(ConfigError, match=r"no member seg\.png in 1 shard"):
        opened(tmp_path / "x.tar", column="seg.png")
    (tmp_path / "x.arrow").write_bytes(b"")
    with pytest.raises(ConfigError, match="--stream reads Parquet"):
        opened(tmp_path / "x.arrow")
