"""`--probe-every`: its file, a run that is stopped, and that the training does not know of it."""

from __future__ import annotations

import csv
import shutil
import signal
from dataclasses import replace

import pytest

from maefast.errors import ConfigError, TrainError
from maefast.probe import watch
from maefast.train import checkpoint, pretrain
from tests.train import victims
from tests.train.common import (
    CREATORS,
    assert_equal,
    convnet_config,
    in_two_parts,
    losses,
    run_process,
    run_together,
    tensors,
    tiny_config,
    write_photos,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), count=15)


def watched(config, photos, every: int = 4):
    return replace(config, probe_every=every, probe_data=str(photos))


def table(out) -> list[tuple[str, ...]]:
    """The rows without their seconds."""
    with open(out / "probe.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == watch.COLUMNS
    return [tuple(row[:-1]) for row in rows[1:]]


def equal_runs(one, two) -> None:
    """Losses, and every tensor of the last checkpoint, to the bit."""
    assert losses(one) == losses(two)
    step = checkpoint.listing(one / "checkpoints")[-1][0]
    assert_equal(tensors(one, step), tensors(two, step))


@pytest.mark.parametrize("kind", ["mae", "fcmae", "toy_spark"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_is_the_same_to_the_bit(photos, tmp_path, kind, workers):
    """Of a ViT, and of convnets with drop path and with batch norms, whose averages live in buffers."""
    make = tiny_config if kind == "mae" else lambda *how, **more: convnet_config(kind, *how, **more)
    create = CREATORS.get(kind)
    plain, probed = (make(photos, tmp_path / name, workers=workers) for name in ("plain", "probed"))
    pretrain(plain, create_model=create)
    pretrain(watched(probed, photos, 2), create_model=create)
    equal_runs(tmp_path / "plain", tmp_path / "probed")
    assert [row[0] for row in table(tmp_path / "probed")] == [str(step) for step in range(0, plain.steps + 1, 2)]
    assert not (tmp_path / "plain" / "probe.csv").exists()


def test_killed_and_resumed(photos, tmp_path):
    whole, parts = (watched(tiny_config(photos, tmp_path / name), photos) for name in ("whole", "parts"))
    assert run_process(victims.train, whole) == 0
    assert run_process(victims.train_and_die, parts, "in a step", 8) == -signal.SIGKILL
    assert [row[0] for row in table(tmp_path / "parts")] == ["0", "4"]
    assert run_process(victims.train, parts) == 0
    equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert [row[0] for row in table(tmp_path / "whole")] == ["0", "4", "8", "12"]


def test_rows_beyond_the_checkpoint_are_taken_again(photos, tmp_path, monkeypatch):
    """Stopped behind step 5 with the last checkpoint of step 3: the row of step 4 and a row that was cut off go."""
    whole, parts = (watched(tiny_config(photos, tmp_path / name), photos) for name in ("whole", "parts"))
    pretrain(whole)
    with monkeypatch.context() as patch:
        original, cut_off = watch.Watch.__call__, []

        def cut(self, recipe, step, device):
            found = original(self, recipe, step, device)
            if step == 4 and not cut_off:
                cut_off.append(step)
                with open(tmp_path / "parts" / "probe.csv", "a") as file:
                    file.write("5,0.1")
            return found

        patch.setattr(watch.Watch, "__call__", cut)
        in_two_parts(parts, patch, 5)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


def test_another_interval_later_on(photos, tmp_path):
    config = tiny_config(photos, tmp_path, steps=3)
    pretrain(config)
    pretrain(watched(replace(config, steps=6), photos, 2))
    assert [row[0] for row in table(tmp_path)] == ["3", "4", "6"]
    pretrain(watched(replace(config, steps=6), photos, 2))  # nothing is left to do
    assert [row[0] for row in table(tmp_path)] == ["3", "4", "6"]


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes(photos, tmp_path, fsdp):
    plain = tiny_config(photos, tmp_path / "plain" / "run", steps=4, fsdp=fsdp, picture_rows=0)
    probed = watched(replace(plain, output_dir=str(tmp_path / "probed" / "run")), photos, 3)
    for name, config in (("plain", plain), ("probed", probed)):
        (tmp_path / name).mkdir()
        assert run_together(victims.train_as, 2, config) == [0, 0]
    equal_runs(tmp_path / "plain" / "run", tmp_path / "probed" / "run")
    assert [row[0] for row in table(tmp_path / "probed" / "run")] == ["0", "3", "4"]


def test_where_it_is_logged(photos, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(watched(tiny_config(photos, tmp_path, steps=4, tensorboard=True), photos))
    assert "step 4: k-NN accuracy" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("probe/knn")
    assert [event.step for event in events] == [0, 4]
    assert [event.value for event in events] == pytest.approx([float(row[1]) for row in table(tmp_path)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_every": 2}, "--probe-every 2 needs --probe-data"),
        ({"probe_data": "photos"}, "--probe-data photos: --probe-every N says when"),
        ({"probe_every": -1}, "--probe-every must not be negative"),
        ({"probe_every": 2, "probe_data": "/nowhere"}, "--probe-data /nowhere: no such folder"),
        (
            {"probe_every": 2, "probe_data": "skimage"},
            "--probe-labels folders: the samples lie in no folders of classes",
        ),
        ({"probe_every": 2, "probe_data": "PHOTOS", "probe_labels": "/nowhere.csv"}, "--probe-labels /nowhere.csv: No"),
    ],
)
def test_errors_come_before_the_first_step(photos, tmp_path, changes, message):
    changes = {name: str(photos) if value == "PHOTOS" else value for name, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        pretrain(tiny_config(photos, tmp_path, **changes))
    assert message in str(caught.value)
    assert losses(tmp_path) == [] if (tmp_path / "metrics.csv").exists() else True


def test_what_has_no_features_is_refused(photos, tmp_path):
    config = tiny_config("20", tmp_path, model="curves", model_args={}, img_size=None, patch_size=None)
    with pytest.raises(ConfigError, match="--probe-every: CurveRecipe gives no features"):
        pretrain(replace(config, probe_every=2, probe_data="20"), create_model=CREATORS["curves"])


def test_an_unreadable_sample(photos, tmp_path, capsys):
    """Before the first step it ends the run; later it costs one row. With skip_bad it is left out."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    path = sorted(data.rglob("*.png"))[0]
    path.write_bytes(b"broken")
    config = watched(tiny_config(photos, tmp_path / "one", steps=4), data, 2)
    with pytest.raises(TrainError, match=r"cannot read image .*\.png"):
        pretrain(config)
    pretrain(replace(config, output_dir=str(tmp_path / "two"), skip_bad=True))
    assert [row[0] for row in table(tmp_path / "two")] == ["0", "2", "4"]
    shutil.copy(sorted(photos.rglob("*.png"))[0], path)
    config = replace(config, output_dir=str(tmp_path / "three"), cache_mb=0)  # nothing stays in memory
    original = watch.Watch.__call__

    def lose(self, recipe, step, device):
        if step == 2:
            path.unlink()
        elif step == 4:
            shutil.copy(sorted(photos.rglob("*.png"))[0], path)
        return original(self, recipe, step, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Watch, "__call__", lose)
        pretrain(config)
    assert [row[0] for row in table(tmp_path / "three")] == ["0", "4"]
    assert "no probe of step 2: cannot read image" in capsys.readouterr().out


def test_samples_in_memory_give_the_same(photos, tmp_path):
    for name, cache in (("kept", 512), ("read", 0)):
        pretrain(watched(tiny_config(photos, tmp_path / name, cache_mb=cache), photos))
    assert table(tmp_path / "kept") == table(tmp_path / "read")
