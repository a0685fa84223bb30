"""Lists of files, and what names mean."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder
from maefast.data.records import expand_braces, open_records
from maefast.errors import BadImage, ConfigError
from maefast.train import pretrain
from tests.data.sources import encoded, goes_on_when_killed, write_images
from tests.train.common import in_two_parts, losses, tiny_config


def options(column=None, skip_bad=False):
    return SimpleNamespace(column=column, skip_bad=skip_bad)


def test_braces():
    assert expand_braces("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert expand_braces("{9..10}.tar") == ["9.tar", "10.tar"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain{x}.tar") == ["plain{x}.tar"]
    assert expand_braces("{0000..0127}.tar")[-1] == "0127.tar"
    with pytest.raises(ConfigError, match="more than a million"):
        expand_braces("{0..10000000}")


def write_list(tmp_path, kind):
    paths = write_images(tmp_path / "pictures")
    names = [f"pictures/{path.name}" for path in paths[:5]] + [str(path) for path in paths[5:]]
    if kind == "txt":
        text = "\n".join(["# a remark", "", *names]) + "\n"
    elif kind == "csv":
        text = "label,path\r\n" + "".join(f'"a,b",{name}\r\n' for name in names)
    elif kind == "tsv":
        text = "label\tfirst\tsecond\n" + "".join(f"x\tnone\t{name}\n" for name in names)
    else:  # one column without a name
        kind, text = "csv", "\n".join(names)
    (tmp_path / f"list.{kind}").write_text(text)
    return tmp_path / f"list.{kind}"


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "bare"])
def test_a_list_is_its_files(tmp_path, kind):
    images = find_images(write_list(tmp_path, kind), options=options("second" if kind == "tsv" else None))
    assert len(images) == 10
    for index in range(10):
        assert images.path(index).read_bytes() == encoded(index)
    assert images.name(0) == "pictures/000000.png"
    assert images.name(9) == "000009.png"


def test_a_run_that_is_killed(tmp_path):
    config = tiny_config(write_list(tmp_path, "csv"), tmp_path / "whole", save_every=1, workers=1)
    goes_on_when_killed(config, tmp_path / "out", 5)


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_run_from_a_list_goes_on_bit_for_bit(tmp_path, monkeypatch, kind):
    data = write_list(tmp_path, kind)
    pretrain(tiny_config(data, tmp_path / "whole"))
    in_two_parts(tiny_config(data, tmp_path / "parts"), monkeypatch, stop=7)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_same_files_are_the_same_run(tmp_path):
    """In the order of the folder, a list gives the losses that the folder gives."""
    data = write_list(tmp_path, "txt")
    pretrain(tiny_config(data, tmp_path / "listed"))
    pretrain(tiny_config(tmp_path / "pictures", tmp_path / "found"))
    assert losses(tmp_path / "listed") == losses(tmp_path / "found")


def test_mistaken_lists(tmp_path):
    write_list(tmp_path, "tsv")

    def refused(name, text, match, column=None):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=match):
            find_images(tmp_path / name, options=options(column))

    refused("a.txt", "\n# nothing\n", "without a path in it")
    refused("a.txt", b"\xff\xfe\x00", "no text in UTF-8")
    refused("a.txt", "nowhere/a.png\nnowhere/b.png", r"its files are not there, such as .*nowhere/a\.png")
    refused("a.csv", "first,second\na,b\n", r"--column NAME must say .* 'first', 'second'")
    refused("a.csv", "first,second\na,b\n", "no column 'third'; its columns are 'first', 'second'", "third")
    refused("a.csv", "label,path\n1,a.png\n2,\n", "row 3 has nothing in the column 'path'")
    refused("a.csv", "label,path\n1,a.png\n2\n", "row 3 has nothing")
    refused("a.txt", "pictures/000000.png", "has a path a line", "path")
    with pytest.raises(ConfigError, match=r"--column x is for tables and tars, and --data .*pictures is neither"):
        find_images(tmp_path / "pictures", options=options("x"))
    with pytest.raises(ConfigError, match="no file has such a name"):
        find_images(tmp_path / "*.tar", options=options())
    with pytest.raises(ConfigError, match=r"\.csv, \.tar files; give those of one kind"):
        open_records(f"{tmp_path}/x.{{tar,csv}}", (".png",), options())


def test_a_file_of_a_list_that_is_gone(tmp_path):
    data = write_list(tmp_path, "txt")
    (tmp_path / "pictures" / "000003.png").unlink()
    with pytest.raises(BadImage, match=r"000003\.png.*--skip-bad"):
        pretrain(tiny_config(data, tmp_path / "strict"))
    result = pretrain(tiny_config(data, tmp_path / "lax", skip_bad=True))
    assert [name.rpartition("/")[2] for name in result.bad] == ["000003.png"]
    assert result.step == result.total


def test_urls_in_lists_and_lists_behind_urls(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for index in range(3):
        memory.pipe_file(f"/lists/pictures/{index}.png", encoded(index))
    memory.pipe_file("/lists/all.txt", b"pictures/0.png\nmemory://lists/pictures/1.png\n")
    (tmp_path / "far.txt").write_text("memory://lists/pictures/2.png\n")
    near, far = find_images("memory://lists/all.txt"), find_images(tmp_path / "far.txt")
    assert [near.path(i).read() for i in range(2)] + [far.path(0).read()] == [encoded(i) for i in range(3)]
    assert np.asarray(Decoder()(far.path(0))).shape == (38, 26, 3)
    memory.pipe_file("/lists/pictures/2.png", b"broken")
    with pytest.raises(BadImage, match=r"memory://lists/pictures/2\.png"):
        Decoder()(far.path(0))
