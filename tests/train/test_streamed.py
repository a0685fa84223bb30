"""Runs over shards that are read front to back: they go on bit for bit, in any number of processes that fits."""

from __future__ import annotations

import gzip
import tarfile
from dataclasses import replace

import pytest

from maefast.data import remote
from maefast.errors import BadFile, BadImage, ConfigError, TrainError, Unreachable
from maefast.train import checkpoint, pretrain
from maefast.train.data_speed import data_speed
from tests.data.sources import encoded, goes_on_when_killed, write_shards, write_tar
from tests.train import victims
from tests.train.common import in_two_parts, losses, rows, run_together, tiny_config

fsspec = pytest.importorskip("fsspec")


CLOUDS = {
    "recipe": "point_mae", "model": "mae_base", "img_size": None, "patch_size": None, "steps": 3,
    "model_args": {
        "points": 64, "groups": 8, "group_size": 8, "embed_dim": 24, "num_heads": 2, "decoder_num_heads": 2,
        "depth": 1, "decoder_depth": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture
def shards(tmp_path):
    """Four of five pictures each, compressed."""
    for tar in write_shards(tmp_path / "shards", shards=4, each=5).glob("*.tar"):
        tar.with_name(f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    return tmp_path / "shards"


def config(data, out, **changes):
    return tiny_config(data, out, **{"stream": True, "shuffle": 3, **changes})


def table(path, count=20):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [encoded(i) for i in range(count)]}), path, row_group_size=6)
    return path


def places(shards, tmp_path, kind):
    if kind == "tar.gz":
        return f"{shards}/*.tar.gz"
    if kind == "parquet":
        return table(tmp_path / "x.parquet")
    system = fsspec.filesystem("memory")
    for path in shards.glob("*.gz"):
        system.pipe_file(f"/streamed/{path.stem}", gzip.decompress(path.read_bytes()))
    return "memory://streamed/{0000..0003}.tar"


@pytest.mark.parametrize(("kind", "workers"), [("tar.gz", 0), ("tar.gz", 2), ("url", 0), ("parquet", 0)])
def test_a_run_goes_on_bit_for_bit(shards, tmp_path, monkeypatch, kind, workers):
    data = places(shards, tmp_path, kind)
    pretrain(config(data, tmp_path / "whole", workers=workers, save_every=100))
    in_two_parts(config(data, tmp_path / "parts", workers=workers), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_is_killed(shards, tmp_path, step):
    goes_on_when_killed(config(shards, tmp_path / "whole", save_every=1, workers=2), tmp_path / "out", step)


def test_the_number_of_workers(shards, tmp_path, monkeypatch):
    """Two streams are read by two workers, by one or by the process itself; other numbers are refused."""
    whole = config(shards, tmp_path / "whole", workers=2, save_every=4)
    pretrain(whole)
    assert float(rows(tmp_path / "whole")[-1]["epoch"]) == 2
    for workers in (0, 1):
        parts = replace(whole, output_dir=str(tmp_path / f"parts{workers}"), steps=8)
        pretrain(parts)
        state = checkpoint.read_state(checkpoint.latest(tmp_path / f"parts{workers}" / "checkpoints")[0])
        assert sorted(state.extra["streams"]["places"]) == ["0", "1"]
        pretrain(replace(parts, workers=workers, steps=12, lr=None, blr=0.1))
        assert [row[0] for row in losses(tmp_path / f"parts{workers}")] == [str(step) for step in range(1, 13)]
    assert losses(tmp_path / "parts0") == losses(tmp_path / "parts1")
    with monkeypatch.context() as patch:
        from maefast.train import loop

        original = loop.Run._step

        def step(self):
            if self.done == 6:
                raise KeyboardInterrupt
            original(self)

        patch.setattr(loop.Run, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(replace(whole, output_dir=str(tmp_path / "last")))
    for change, words in (
        ({"workers": 3}, r"2 streams and a batch of 4 per process, .* give --workers 1 or 2, or 0"),
        ({"batch_size": 6}, "goes on with a multiple of 4"),
        ({"batch_size": 16}, "with --batch-size 4"),
        ({"shuffle": 5}, "--shuffle 5: the run was begun with 3"),
        ({"data": f"{shards}/000[0-2].tar.gz"}, r"\(4 then, 3 now\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            pretrain(replace(whole, output_dir=str(tmp_path / "last"), **change))
    pretrain(replace(whole, output_dir=str(tmp_path / "last"), workers=0))
    assert losses(tmp_path / "last") == losses(tmp_path / "whole")


def test_two_processes_go_on_as_one(shards, tmp_path):
    """Two with two streams each, and then one with four batches' worth of them: the same samples a step."""
    together = config(shards, tmp_path / "out", workers=2, batch_size=2, steps=8, save_every=4)
    assert run_together(victims.train_as, 2, replace(together, output_dir=str(tmp_path / "whole"))) == [0, 0]
    state = checkpoint.read_state(tmp_path / "whole" / "checkpoints" / "step-00000004").extra["streams"]
    assert (state["count"], state["unit"], sorted(state["places"])) == (4, 2, ["0", "1", "2", "3"])
    again = replace(together, resume=str(tmp_path / "whole" / "checkpoints" / "step-00000004"), workers=1)
    assert run_together(victims.train_as, 2, replace(again, output_dir=str(tmp_path / "two"))) == [0, 0]
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")[4:]
    pretrain(replace(again, output_dir=str(tmp_path / "one"), batch_size=4, workers=2))
    for (step, one, lr), (step2, two, lr2) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "whole")[4:], strict=True
    ):
        assert (step, lr) == (step2, lr2)
        assert float(one) == pytest.approx(float(two), rel=1e-4)


def test_indices_of_tars_are_made_by_one(tmp_path):
    write_shards(tmp_path / "shards")
    whole = tiny_config(tmp_path / "shards", tmp_path / "out", batch_size=2, steps=2)
    assert run_together(victims.train_as, 2, whole) == [0, 0]
    assert "indices of tars were made" in (tmp_path / "rank0.txt").read_text()
    (tmp_path / "shards" / "0001.tar").write_bytes(b"")
    assert run_together(victims.train_as, 2, replace(whole, output_dir=str(tmp_path / "out2"))) == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_bad_is_skipped_and_named(shards, tmp_path, monkeypatch, workers):
    members = [(f"{i}.png", encoded(i) if i != 3 else b"broken") for i in range(5)]
    write_tar(shards / "0001.tar", members)
    (shards / "0001.tar.gz").unlink()
    (shards / "0002.tar.gz").write_bytes((shards / "0002.tar.gz").read_bytes()[:-600])
    lax = config(shards, tmp_path / "whole", workers=workers, skip_bad=True, save_every=100)
    result = pretrain(lax)
    assert sorted(path.removeprefix(f"{shards}/") for path in result.bad) == ["0001.tar/3.png", "0002.tar.gz"]
    in_two_parts(replace(lax, output_dir=str(tmp_path / "parts"), save_every=3), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_without_leave_it_stops_and_saves(shards, tmp_path, monkeypatch):
    whole = config(shards, tmp_path / "whole", save_every=100)
    pretrain(whole)
    # Behind what is looked at before a run.
    monkeypatch.setattr("maefast.data.streams._EACH", 2)
    good = (shards / "0002.tar.gz").read_bytes()
    for number, (data, error, words) in enumerate(
        (
            (good[:-400], BadFile, r"cannot read .*0002\.tar\.gz: .*--skip-bad"),
            (packed(broken=12), BadImage, r"cannot read image .*0002\.tar\.gz/000012\.png"),
        )
    ):
        (shards / "0002.tar.gz").write_bytes(data)
        out = tmp_path / f"out{number}"
        with pytest.raises(error, match=words):
            pretrain(replace(whole, output_dir=str(out)))
        assert checkpoint.latest(out / "checkpoints")[0] is not None
        (shards / "0002.tar.gz").write_bytes(good)
        pretrain(replace(whole, output_dir=str(out)))
        assert losses(out) == losses(tmp_path / "whole")


def packed(broken):
    """The third of the shards with a picture that is none."""
    import io

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(10, 15):
            for kind in ("png", "cls", "json"):
                data = b"broken" if i == broken else encoded(i) if kind == "png" else b"1"
                entry = tarfile.TarInfo(f"{i:06}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(file.getvalue())


def test_nothing_can_be_read(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{i}.npy", b"broken") for i in range(4)])
    clouds = config(tmp_path / "x.tar", tmp_path / "out", skip_bad=True, **CLOUDS)
    with pytest.raises(TrainError, match=r"none of the clouds of a whole pass can be read; the last: .*x\.tar/\d\.npy"):
        pretrain(clouds)


def test_a_store_that_goes_away(shards, tmp_path, monkeypatch):
    data = places(shards, tmp_path, "url")
    whole = config(data, tmp_path / "whole", save_every=100, skip_bad=True)
    pretrain(whole)
    with monkeypatch.context() as patch:
        read, calls = remote.read, []

        def read_some(*arguments):
            calls.append(1)
            if len(calls) > 10:
                raise Unreachable(arguments[0], f"{Unreachable.START} in 1 attempt")
            return read(*arguments)

        patch.setattr(remote, "read", read_some)
        with pytest.raises(Unreachable, match="the same command goes on from here"):
            pretrain(replace(whole, output_dir=str(tmp_path / "out")))
    pretrain(replace(whole, output_dir=str(tmp_path / "out")))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_what_is_refused(shards, tmp_path, photos):
    with pytest.raises(ConfigError, match=r"--stream does not know how many .* --steps"):
        pretrain(config(shards, tmp_path / "out", steps=None))
    with pytest.raises(ConfigError, match=r"is neither tars .* nor Parquet"):
        pretrain(config(photos, tmp_path / "out"))
    pretrain(tiny_config(photos, tmp_path / "out", steps=2))
    with pytest.raises(ConfigError, match="of a run without --stream"):
        pretrain(config(shards, tmp_path / "out"))


def test_how_fast_it_is(shards, tmp_path):
    lines = []
    data_speed(config(shards, tmp_path / "out", workers=1, steps=None), 0.1, lines.append)
    assert lines[0].startswith("streams of ")
    assert lines[1].startswith("no worker: ")
    assert not (tmp_path / "out").exists()


def test_classes_on_the_way(shards, photos, tmp_path):
    """What is probed has an index."""
    pretrain(config(shards, tmp_path / "out", steps=2, probe_every=1, probe_data=str(photos)))
    assert len((tmp_path / "out" / "probe.csv").read_text().splitlines()) == 4


def test_other_data_than_photographs(tmp_path, monkeypatch):
    """Images of numbers, and a recipe of arrays."""
    import io

    import numpy as np

    def array(shape, seed):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(seed).normal(size=shape).astype(np.float32))
        return file.getvalue()

    write_tar(tmp_path / "numbers.tar", [(f"{i}.npy", array((4, 20 + i, 24), i)) for i in range(8)])
    write_tar(tmp_path / "clouds.tar", [(f"{i}.npy", array((64, 3), i)) for i in range(8)])
    for name, more in (("numbers", {"channels": 4, "steps": 6}), ("clouds", CLOUDS)):
        whole = config(tmp_path / f"{name}.tar", tmp_path / name, save_every=1, **more)
        pretrain(whole)
        in_two_parts(replace(whole, output_dir=str(tmp_path / f"{name}2")), monkeypatch, stop=2)
        assert losses(tmp_path / name) == losses(tmp_path / f"{name}2")
