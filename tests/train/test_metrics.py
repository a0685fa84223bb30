"""metrics.csv, TensorBoard, the progress lines, the loss curve."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maefast.train import metrics, pretrain
from maefast.train.metrics import HEADER, Counter, MetricsFile, Progress, Row, read_rows, save_loss_curve
from tests.train.common import rows, tiny_config


def row(step, loss=0.1):
    return Row(step, step / 3, loss, 1e-3, None, 100.0, 0.25)


def test_rows_beyond_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, 0)
    first.write([row(step) for step in range(1, 6)])
    first.close()
    with open(path, "a") as file:
        file.write("6,2.0,0.")  # a kill in the middle of a row
    second = MetricsFile(path, 3)
    second.write([row(4, 0.5)])
    second.close()
    found = read_rows(path)
    assert [(r["step"], r["loss"]) for r in found] == [("1", "0.1"), ("2", "0.1"), ("3", "0.1"), ("4", "0.5")]
    assert path.read_text().splitlines()[0] == ",".join(HEADER)
    assert not path.with_suffix(".tmp").exists()


def test_parts_of_the_loss_have_columns(tmp_path):
    path = tmp_path / "m.csv"
    old = MetricsFile(path, 0)
    old.write([row(1)])  # by a version that wrote none
    old.close()
    file = MetricsFile(path, 1)
    file.write([replace(row(2), terms={"pixels": 0.1, "features": 0.25}), replace(row(3), terms={"features": 0.5})])
    file.close()
    again = MetricsFile(path, 2)
    again.write([replace(row(3), terms={"features": 1.0, "pixels": 2.0})])
    again.close()
    assert path.read_text().splitlines()[0] == ",".join([*HEADER, "loss/pixels", "loss/features"])
    found = [(r["step"], r["loss/pixels"], r["loss/features"], r["data_wait"]) for r in read_rows(path)]
    assert found == [("1", "", "", "0.25"), ("2", "0.1", "0.25", "0.25"), ("3", "2.0", "1.0", "0.25")]


def test_floats_read_back_exactly(tmp_path):
    values = [float(np.float32(x)) for x in (1 / 3, 1e-12, 123456.789)]
    file = MetricsFile(tmp_path / "m.csv", 0)
    file.write([row(i, value) for i, value in enumerate(values, 1)])
    file.close()
    assert [float(r["loss"]) for r in read_rows(tmp_path / "m.csv")] == values


def test_a_fresh_run_replaces_rows_of_one_killed_before_its_first_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write([row(1), row(2)])
    file.close()
    MetricsFile(path, 0).close()
    assert read_rows(path) == []


def test_tensorboard_has_every_step_once_after_a_resume(photos, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(tiny_config(photos, tmp_path, steps=5, save_every=3, tensorboard=True, clip=1.0))
    time.sleep(1.1)  # TensorBoard sorts files of one second by a counter of the process, as text: "10" before "9"
    pretrain(tiny_config(photos, tmp_path, steps=9, save_every=3, tensorboard=True, clip=1.0, picture_rows=2))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 10))
    assert [event.value for event in scalars] == pytest.approx([float(r["loss"]) for r in rows(tmp_path)])
    assert {"train/lr", "train/grad_norm", "train/images_per_s", "train/data_wait"} <= set(events.Tags()["scalars"])
    assert events.Images("reconstruction")[-1].step == 9


def test_without_tensorboard_the_run_says_so_and_goes_on(photos, tmp_path, monkeypatch, capsys):
    import maefast.train.loop as loop

    monkeypatch.setattr(loop, "open_tensorboard", lambda folder, done: None)
    assert pretrain(tiny_config(photos, tmp_path, steps=1, tensorboard=True)).step == 1
    assert "tensorboard is not installed" in capsys.readouterr().out


def test_progress_lines_name_the_numbers(capsys):
    progress = Progress(total=100, done=10, show=True, seconds=0.0)
    progress.update(1, row(11))
    progress.update(1, None)
    progress.say("a message")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert "step 11/100  loss 0.1000  lr 1.00e-03  100 images/s  data wait 25%" in lines[0]
    assert lines[1:] == ["a message"]
    Progress(total=1, done=0, show=False).say("not the main process")
    assert capsys.readouterr().out == ""


def test_names_that_are_no_text_are_told_where_stdout_takes_text_only(tmp_path, monkeypatch):
    """Before the first step, and at the end of a run."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    page = Image.new("RGB", (20, 20))
    page.save(tmp_path / "x.tif", save_all=True, append_images=[page])
    try:
        (tmp_path / "x.tif").rename(tmp_path / os.fsdecode(b"pages\xff.tif"))
    except OSError:
        pytest.skip("this file system knows only text")
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"nothing")
    assert pretrain(tiny_config(tmp_path, tmp_path / "out", steps=2, skip_bad=True)).step == 2
    stdout.flush()
    text = stdout.buffer.getvalue().decode()
    assert "pages\\udcff.tif has 2 pages" in text
    assert f"skipped unreadable image {tmp_path}/bad\\udcff.png: " in text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_told_with_the_file(tmp_path):
    file = MetricsFile(tmp_path / "m.csv", 0)
    file.close()
    file._file = open("/dev/full", "w")  # noqa: SIM115
    file._writer = csv.writer(file._file)
    for call in (lambda: file.write([row(1)]), file.sync, file.close):
        with pytest.raises(OSError, match="No space left on device") as caught:
            call()
        assert caught.value.filename == str(tmp_path / "m.csv")


def test_writers_of_one_folder_have_files_of_their_own(tmp_path, monkeypatch):
    """And a file that could not be written leaves nothing."""
    from matplotlib.figure import Figure

    from maefast.data.figure import FigurePicture

    class Drawing(FigurePicture):
        def _figure(self, title):
            return Figure()

    def savefig(self, path, **_):
        seen.append(path)
        path.touch()
        raise OSError(28, "No space left on device")

    seen, metrics_of_a_run = [], MetricsFile(tmp_path / "m.csv", 0)
    metrics_of_a_run.write([row(1)])
    metrics_of_a_run.close()
    monkeypatch.setattr(Figure, "savefig", savefig)
    calls = {
        "curve.png": lambda path: save_loss_curve(tmp_path / "m.csv", path),
        "a.png": lambda path: Drawing().save(path, ""),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match="No space left on device") as caught:
            call(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
        assert str(os.getpid()) in seen[-1].name
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_the_count_of_steps_is_told_now_and_then(capsys):
    count = Counter(seconds=0.0)
    count(3, 9)
    count.close()
    assert capsys.readouterr().err == "step 3/9\n"
    count = Counter(seconds=60.0)
    count(3, 9)
    assert capsys.readouterr().err == ""


def test_gradient_norm_is_logged_when_clipping(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path / "a", steps=2, clip=0.5))
    pretrain(tiny_config(photos, tmp_path / "b", steps=2))
    assert all(float(r["grad_norm"]) > 0 for r in rows(tmp_path / "a"))
    assert all(r["grad_norm"] == "" for r in rows(tmp_path / "b"))


def test_loss_curve_is_drawn_from_the_csv(tmp_path):
    file = MetricsFile(tmp_path / "m.csv", 0)
    save_loss_curve(tmp_path / "m.csv", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()  # nothing to draw yet
    file.write([row(step, 2.0 / step) for step in range(1, 200)])
    file.close()
    save_loss_curve(tmp_path / "m.csv", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == [0x1F, 0x4E, 0x8C]).all(1).sum() > 100  # the mean curve's colour


def test_a_wait_is_measured(photos, tmp_path, monkeypatch):
    """A loader that sleeps shows up as waiting; the share is that of the whole step."""
    from maefast.data.images.samples import TrainImages

    original = TrainImages.__getitem__

    def slow(self, where):
        time.sleep(0.05)
        return original(self, where)

    monkeypatch.setattr(TrainImages, "__getitem__", slow)
    pretrain(tiny_config(photos, tmp_path, steps=3))
    assert all(float(r["data_wait"]) > 0.5 for r in rows(tmp_path))
    assert metrics.HEADER[-1] == "data_wait"
