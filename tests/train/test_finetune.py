"""`maefast finetune`, of runs and files: figures, files, resuming, bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from maefast import cli
from maefast.data.runs import complete_rows
from maefast.errors import BadFile, CheckpointError, ConfigError, TrainError
from maefast.finetune.classifier import classifier_of, timm_state
from maefast.train import loop, pretrain
from maefast.train.config import PretrainConfig
from maefast.train.export import export_file
from maefast.train.finetune import Options, finetune
from maefast.train.probe import probe
from maefast.train.reopen import open_recipe
from tests.train.common import TINY, convnet_config, losses, tiny_config, write_photos

RUN = {"steps": 6, "batch_size": 4, "workers": 0, "device": "cpu", "save_every": 2, "tensorboard": False, "lr": 1e-3}


def options(**changes) -> Options:
    run = {**RUN, **{key: changes.pop(key) for key in list(changes) if key not in Options.__dataclass_fields__}}
    return Options(**{"eval_every": 3, "ema_decay": 0.9, **changes}, run=run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(photos, run of a ViT, run of an FCMAE)."""
    photos = write_photos(tmp_path_factory.mktemp("photos"), count=15)
    out = tmp_path_factory.mktemp("runs")
    pretrain(tiny_config(photos, out / "mae", steps=2, model_args={**TINY, "depth": 2}))
    pretrain(convnet_config("fcmae", photos, out / "fcmae", steps=2))
    return photos, out / "mae", out / "fcmae"


def test_a_run_from_the_command_line(trained, tmp_path):
    photos, start, _ = trained
    arguments = ["finetune", start, "--data", photos, "-o", tmp_path / "out", "--steps", 4, "--batch-size", 4,
                 "--workers", 0, "--device", "cpu", "--lr", 1e-3, "--ema-decay", 0.9, "--drop-path", 0.2]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "finetune.json").read_text())
    low, high = document["interval"]
    assert low <= document["accuracy"] <= high
    assert (document["learnt_from"], document["held_back"], document["steps"]) == (12, 3, 4)
    assert document["classes"] == ["group0", "group1", "group2"]
    assert (document["weights"], document["published"]) == ("average", "facebookresearch/mae, ViT-B")
    assert (document["layer_decay"], document["drop_path"], document["mixup"]) == (0.65, 0.2, 0.8)
    columns, rows = complete_rows(tmp_path / "out" / "accuracy.csv")
    assert columns[:2] == ["step", "accuracy"]
    assert [row[0] for row in rows] == ["0", "3", "4"]  # before the first, after an epoch, at the end
    assert float(rows[-1][1]) == document["accuracy"]
    assert len(losses(tmp_path / "out")) == 4
    assert "fine-tuned, running average" in result.output
    assert (tmp_path / "out" / "loss_curve.png").is_file()


@pytest.mark.parametrize("kind", ["mae", "fcmae"])
def test_a_run_goes_on_where_it_was_stopped(trained, tmp_path, monkeypatch, kind):
    photos, *starts = trained
    start = starts[kind == "fcmae"]
    how = options(drop_path=0.3, mixup=0.8, cutmix=1.0, skip_bad=True)
    whole = finetune(start, str(photos), tmp_path / "whole", how, say=str)
    original = loop.Run._step

    def step(run):
        if run.done == 5:  # the last checkpoint holds 4
            raise KeyboardInterrupt
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            finetune(start, str(photos), tmp_path / "parts", how, say=str)
    parts = finetune(start, str(photos), tmp_path / "parts", how, say=str)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len({loss for _, loss, _ in losses(tmp_path / "whole")}) == 6
    assert parts == whole
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    assert finetune(start, str(photos), tmp_path / "parts", how, say=str) == whole  # a finished run, called again
    assert [row[0] for row in complete_rows(tmp_path / "parts" / "accuracy.csv")[1]] == ["0", "3", "6"]


def test_a_finished_run_tells_what_it_was_trained_with(trained, tmp_path, capsys):
    photos, start, _ = trained
    document = finetune(start, str(photos), tmp_path, options(), say=str)
    config = (tmp_path / "config.yaml").read_text()
    capsys.readouterr()
    changed = options(mixup=0.1, layer_decay=0.3, lr=0.5, weight_decay=0.7, batch_size=2)
    assert finetune(start, str(photos), tmp_path, changed, say=str) == document
    assert json.loads((tmp_path / "finetune.json").read_text())["mixup"] == 0.8
    assert (tmp_path / "config.yaml").read_text() == config
    text = capsys.readouterr().out
    assert all(part in text for part in ("no step is left", "lr: 0.001 -> 0.5", "mixup: 0.8 -> 0.1"))


def test_the_weights_are_those_that_were_judged(trained, tmp_path):
    photos, start, _ = trained
    finetune(start, str(photos), tmp_path, options(ema_decay=0.0), say=str)
    saved = load_file(tmp_path / "model.safetensors")
    network = classifier_of(open_recipe(start).recipe.model, 3)
    assert saved.keys() == timm_state(network).keys()
    network.load_state_dict(saved)
    state = load_file(tmp_path / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in saved.items())
    for left in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="a classifier, as `maefast finetune` writes one"):
            open_recipe(left)


def test_an_exported_encoder_gives_the_same(trained, tmp_path):
    photos, start, _ = trained
    export_file(start, tmp_path / "encoder.pth", "timm")
    alone = finetune(tmp_path / "encoder.pth", str(photos), tmp_path / "a", options(), heads=[2], say=str)
    whole = finetune(start, str(photos), tmp_path / "b", options(), say=str)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert alone["hits"] == whole["hits"]


def test_numbers_of_any_channels(tmp_path):
    """Two classes that differ by their level: learned in a few steps, from chance."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (rng.random((5, 20, 20)) + 3 * (i % 2)).astype(np.float32))
    pretrain(tiny_config(tmp_path / "data", tmp_path / "run", steps=2, channels=5))
    how = options(mixup=0.0, cutmix=0.0, ema_decay=0.0, layer_decay=1.0, steps=20, lr=1e-2, val_share=0.5)
    document = finetune(tmp_path / "run", str(tmp_path / "data"), tmp_path / "out", how, say=str)
    assert document["accuracy"] == 1.0
    assert document["most_frequent_class"]["accuracy"] == 0.5


def test_a_set_of_its_own_to_hold_back(trained, tmp_path):
    photos, start, _ = trained
    shutil.copytree(photos, tmp_path / "held")
    for path in sorted((tmp_path / "held").rglob("*.png"))[::2]:
        path.unlink()
    document = finetune(start, str(photos), tmp_path / "a", options(val_data=str(tmp_path / "held")), say=str)
    assert (document["learnt_from"], document["held_back"]) == (15, 7)
    (tmp_path / "held" / "strange").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "held" / "strange")
    with pytest.raises(ConfigError, match="--labels folders: the training part has none of 1 classes: strange"):
        finetune(start, str(photos), tmp_path / "b", options(val_data=str(tmp_path / "held")), say=str)
    assert not (tmp_path / "b").exists()  # before anything starts


def test_what_stands_in_for_an_unreadable_image_has_its_own_class(trained, tmp_path):
    photos, start, _ = trained
    shutil.copytree(photos, tmp_path / "data")
    for name in ("group0/image06.png", "group1/image07.png"):
        (tmp_path / "data" / name).write_bytes(b"no picture")
    from maefast.finetune.layers import published
    from maefast.train.finetune import _config, _data

    opened = open_recipe(start)
    how = options(val_share=0.2, skip_bad=True)
    config = _config(opened, str(tmp_path / "data"), tmp_path / "out", how, published(opened.recipe.model), {})
    source, *_ = _data(opened, config, how)
    samples = source.samples()
    names = [source.source.images.name(int(i)) for i in source.which]
    good = 0
    for index in range(len(source)):
        _, position, bad, label = samples[(index, 0, index)]
        at = (index + len(bad)) % len(source)
        assert label == source.labels[at] == int(names[at].split("/")[0][-1])
        assert position == index
        good += not bad
    assert 0 < len(source) - good <= 2
    with pytest.raises(BadFile, match="--skip-bad counts and skips"):
        finetune(start, str(tmp_path / "data"), tmp_path / "out", options(steps=8), say=str)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 1.5}, "--layer-decay must be above 0 and at most 1, not 1.5"),
        ({"drop_path": 1.0}, "--drop-path must be at least 0 and below 1, not 1.0"),
        ({"mixup": -1.0}, "--mixup must be at least 0, and finite, not -1.0"),
        ({"val_labels": "folders"}, "--val-labels needs --val-data"),
        ({"val_data": "x", "val_share": 0.5}, "give --val-data or --val-share, not both"),
        ({"val_share": float("nan")}, "--val-share must be above 0 and below 1, not nan"),
        ({"eval_every": 0}, "--eval-every must be at least 1, not 0"),
        ({"epochs": 3.0}, "give --steps or --epochs, not both"),
        ({"depth": 3}, "run has no depth"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        options(**changes)


@pytest.fixture(scope="module")
def begun(trained, tmp_path_factory):
    """A fine-tuning of four steps."""
    photos, start, _ = trained
    out = tmp_path_factory.mktemp("begun") / "out"
    finetune(start, str(photos), out, options(steps=4), say=str)
    return out


def _copy(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("changes", [{"seed": 3}, {"val_share": 0.5}, {"val_data": "PHOTOS"}])
def test_a_run_does_not_go_on_with_other_samples_held_back(trained, begun, tmp_path, changes):
    """The accuracy would count samples that it learnt from."""
    photos, start, _ = trained
    out = _copy(begun, tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in ("finetune.json", "accuracy.csv")}
    changes = {key: str(photos) if value == "PHOTOS" else value for key, value in changes.items()}
    for steps in (4, 6):
        with pytest.raises(ConfigError, match=r"began with .* --val-share 0\.2 --seed 0: give these again, or") as told:
            finetune(start, str(photos), out, options(steps=steps, **changes), say=str)
        assert "\n" not in str(told.value)
    assert before == {name: (out / name).read_bytes() for name in before}
    assert finetune(start, str(photos), out, options(), say=str)["steps"] == 6  # with those of the start it does


def test_a_run_does_not_go_on_without_its_average(trained, begun, tmp_path):
    photos, start, _ = trained
    _copy(begun, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has --ema-decay 0.9, and now it is 0: .* another --output"):
        finetune(start, str(photos), tmp_path / "out", options(ema_decay=0.0), say=str)


def test_a_run_does_not_go_on_with_changed_data(trained, begun, tmp_path):
    photos, start, _ = trained
    out, data = _copy(begun, tmp_path / "out"), _copy(photos, tmp_path / "photos")
    assert finetune(start, str(data), out, options(steps=5), say=str)["steps"] == 5  # moved, and the same
    for index in range(9):
        shutil.copy(next(data.rglob("*.png")), data / "group1" / f"more{index}.png")
    with pytest.raises(ConfigError, match=r"photos --labels folders .*: the data have changed since"):
        finetune(start, str(data), out, options(), say=str)


def test_a_run_goes_on_with_the_encoder_that_it_began_from(trained, begun, tmp_path, capsys):
    photos, start, _ = trained
    out, moved = _copy(begun, tmp_path / "out"), _copy(start, tmp_path / "moved")
    document = finetune(moved, str(photos), out, options(steps=5), say=str)
    assert (document["checkpoint"], document["checkpoint_step"]) == (str(moved), 2)
    pretrain(tiny_config(photos, moved, steps=3, model_args={**TINY, "depth": 2}))
    document = finetune(moved, str(photos), out, options(), say=str)  # its pre-training went on
    assert "moved has other weights than when this run began from it; they are not used" in capsys.readouterr().out
    assert (document["checkpoint"], document["checkpoint_step"], document["steps"]) == (str(moved), 2, 6)
    other = moved / "checkpoints" / "step-00000003"
    with pytest.raises(ConfigError, match=r"began from .*moved \(step 2\), whose encoder is another than that of "):
        finetune(other, str(photos), out, options(steps=7), say=str)


def test_a_run_that_is_older_than_such_checks_goes_on(trained, begun, tmp_path):
    photos, start, _ = trained
    out = _copy(begun, tmp_path / "out")
    for path in (out / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        del state["extra"]["began"]
        path.write_text(json.dumps(state))
    document = finetune(start, str(photos), out, options(seed=3), say=str)
    assert (document["checkpoint"], document["checkpoint_step"]) == (str(start), None)
    state = json.loads((out / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert "began" not in state["extra"]  # what it began with is not known


def test_what_is_said_of_the_samples(trained, tmp_path):
    photos, start, _ = trained
    lines = []
    finetune(start, str(photos), tmp_path / "a", options(steps=1, val_share=0.01), say=lines.append)
    assert any("3 held back (20.0% of all, by class, seed 0)" in line for line in lines)
    finetune(start, str(photos), tmp_path / "b", options(steps=1, val_data=str(photos)), say=lines.append)
    assert sum(line.startswith(f"warning: --val-data {photos}: 15 of 15 are in --data too") for line in lines) == 1


def test_messages_have_the_option_of_this_command(trained, begun, tmp_path):
    photos, start, _ = trained
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output .*file: .* is not a folder"):
        finetune(start, str(photos), tmp_path / "file", options(), say=str)
    with pytest.raises(ConfigError, match=r"choose another folder \(-o\)"):
        finetune(start, str(photos), begun, options(resume="none"), say=str)


def test_bad_input(trained, tmp_path):
    photos, start, _ = trained
    with pytest.raises(ConfigError, match="--batch-size must be at least 1, not 0"):
        finetune(start, str(photos), tmp_path / "a", options(batch_size=0), say=str)
    with pytest.raises(ConfigError, match="--val-data /nowhere: no such"):
        finetune(start, str(photos), tmp_path / "a", options(val_data="/nowhere"), say=str)
    with pytest.raises(ConfigError, match=r"--labels .*gone\.csv: No such file"):
        finetune(start, str(photos), tmp_path / "a", options(labels=str(tmp_path / "gone.csv")), say=str)
    with pytest.raises(ConfigError, match="two classes or more"):
        finetune(start, str(photos / "group0" / ".."), tmp_path / "a", options(labels=_one_class(photos, tmp_path)),
                 say=str)  # fmt: skip
    finetune(start, str(photos), tmp_path / "done", options(steps=1), say=str)
    for again in (finetune, probe):  # a classifier is no masked autoencoder
        with pytest.raises(TrainError):
            again(tmp_path / "done", str(photos), tmp_path / "b", say=str)
    other = _renamed(photos, tmp_path / "more")
    with pytest.raises(TrainError, match=r"the checkpoint holds another model .*classes"):
        finetune(start, str(other), tmp_path / "done", options(steps=2), say=str)


def _one_class(photos, folder) -> str:
    names = [path.relative_to(photos).as_posix() for path in photos.rglob("*.png")]
    (folder / "one.csv").write_text("".join(f"{name},a\n" for name in names))
    return str(folder / "one.csv")


def _renamed(photos, target):
    shutil.copytree(photos, target)
    (target / "group0").rename(target / "other")
    return target


def test_digits_are_learned(tmp_path):
    """A short fine-tuning of a small ViT, on a few of scikit-learn's digits, is far above chance."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    for i in np.flatnonzero(digits.target < 4)[:240]:
        path = tmp_path / "data" / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(digits.images[i] * 255 / 16).astype(np.uint8)).resize((16, 16)).save(path)
    model = {**TINY, "embed_dim": 32, "depth": 2, "in_chans": 1}
    pretrain(PretrainConfig(**{**tiny_config(tmp_path / "data", tmp_path / "run", steps=40).to_dict(),
                               "model_args": model, "batch_size": 32, "lr": 2e-3}))  # fmt: skip
    how = options(mixup=0.0, cutmix=0.0, ema_decay=0.0, flip=0.0, crop_scale=(0.7, 1.0), steps=60, batch_size=32,
                  lr=4e-3, eval_every=60)  # fmt: skip
    document = finetune(tmp_path / "run", str(tmp_path / "data"), tmp_path / "out", how, say=str)
    assert document["interval"][0] > 0.5
    assert document["most_frequent_class"]["accuracy"] < 0.3
