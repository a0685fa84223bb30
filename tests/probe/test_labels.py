"""Classes from folders and from CSV files."""

from __future__ import annotations

import pytest

from maefast.errors import ConfigError
from maefast.probe.labels import read_labels

NAMES = ["cats/1.png", "cats/more/2.png", "dogs/1.png", "dogs/3.png"]


def table(tmp_path, text: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return str(path)


def test_folders():
    assert read_labels("folders", NAMES) == (["cats", "cats", "dogs", "dogs"], [])
    found, notes = read_labels("folders", [*NAMES, "loose.png"])
    assert found == ["cats", "cats", "dogs", "dogs", None]
    assert "1 (loose.png)" in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "cats/1.png,a\ncats/more/2.png,b\ndogs/1.png,a\ndogs/3.png,b\n",
        "anything,else\ncats/1.png,a\ncats/more/2.png,b\ndogs/1.png,a\ndogs/3.png,b\n",
        "Label,width,Filename\na,3,cats/1.png\nb,3,./cats/more/2.png\na,3,dogs/1.png\nb,4,dogs\\3.png\n",
        "\ufeffid,class\ncats/1,a\n2,b\ndogs/1.png, a\n3.png,b \n\n",  # without endings, by a name that is one only
        'file,label\n"cats/1.png",a\ncats/more/2.png,b\ndogs/1.png,a\ndogs/3.png,b\nbirds/1.png,c\n',
    ],
)
def test_tables(tmp_path, text):
    assert read_labels(table(tmp_path, text), NAMES) == (["a", "b", "a", "b"], [])


def test_what_has_no_row_is_left_out(tmp_path):
    """Two samples are called 1.png: that alone names neither."""
    found, notes = read_labels(table(tmp_path, "file,label\n1.png,a\n2.png,b\ndogs/3.png,\n"), NAMES)
    assert found == [None, "b", None, None]
    assert "3 (cats/1.png, dogs/1.png, dogs/3.png)" in notes[0]


def test_a_name_of_several_samples_is_none(tmp_path):
    """Without the ending as well, in one folder."""
    names = ["a/1.png", "a/1.jpg", "b/2.png"]
    found, notes = read_labels(table(tmp_path, "file,label\na/1,cat\nb/2,dog\n"), names)
    assert found == [None, None, "dog"]
    assert "2 (a/1.png, a/1.jpg)" in notes[0]
    assert read_labels(table(tmp_path, "file,label\na/1.png,cat\na/1,dog\n"), names)[0] == ["cat", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("file,label\nbirds/1.png,a\n", "none of the 4 samples is in it; it has 'birds/1.png'"),
        ("a,b,c\n1,2,3\n", "its 3 columns .a, b, c. are not known"),
        ("file,label\ncats/1.png\n", "row 2 has 1 columns"),
        ("file,label\ncats/1.png,a\ncats/1.png,b\n", "cats/1.png has two classes, 'a' and 'b'"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"--labels .*labels.csv: {message}"):
        read_labels(table(tmp_path, text), NAMES)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"--probe-labels .*nowhere.csv: No such file.*give 'folders', or a CSV"):
        read_labels(str(tmp_path / "nowhere.csv"), NAMES, "--probe-labels")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00bad\x00")
    with pytest.raises(ConfigError, match="no CSV in UTF-8"):
        read_labels(str(tmp_path / "a.csv"), NAMES)
    with pytest.raises(ConfigError, match="lie in no folders of classes"):
        read_labels("folders", ["1.png", "2.png"])
    with pytest.raises(ConfigError, match=r"0001.tar/a.png lies in no folder; a CSV file tells"):
        read_labels("folders", ["0001.tar/a.png", "0002.tar/b.png"])
