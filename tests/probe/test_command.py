"""`maefast probe`, of runs, files and recipes."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from maefast import cli
from maefast.errors import CheckpointError, ConfigError
from maefast.probe.watch import read_rows
from maefast.train import pretrain
from maefast.train.build import recipe_options
from maefast.train.config import PretrainConfig
from maefast.train.export import export_file
from maefast.train.probe import Options, probe
from maefast.train.reopen import open_recipe
from tests.train.common import convnet_config, tiny_config, write_photos


def run(*arguments):
    return CliRunner().invoke(cli.app, ["probe", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(photos, run), the run probed with the seed of the command's default."""
    photos = write_photos(tmp_path_factory.mktemp("photos"), count=15)
    out = tmp_path_factory.mktemp("run")
    pretrain(tiny_config(photos, out, probe_every=6, probe_data=str(photos)))
    return photos, out


def test_a_run(trained, tmp_path):
    photos, out = trained
    result = run(out, "--data", photos, "-o", tmp_path / "probe", "--baselines", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "features of 15 images ..." in result.output
    document = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert document["classes"] == ["group0", "group1", "group2"]
    assert (document["learnt_from"], document["held_back"]) == (12, 3)
    assert (document["step"], document["features"], document["unit"]) == (12, 16, "image")
    assert document["baselines"].keys() == {"random weights", "pixels"}
    for entry in (document["knn"], document["linear"], document["baselines"]["pixels"]["linear"]):
        low, high = entry["interval"]
        assert low <= entry["accuracy"] <= high
    for name in ("classes.png", "patches.png"):
        with Image.open(tmp_path / "probe" / name) as image:
            assert image.width > 100
    # The same figures as those that the run wrote down, at its end and where it began.
    rows = {row["step"]: float(row["knn"]) for row in read_rows(out / "probe.csv")}
    assert document["knn"]["accuracy"] == rows["12"]
    assert document["baselines"]["random weights"]["knn"]["accuracy"] == rows["0"]
    again = run(out, "--data", photos, "-o", tmp_path / "probe", "--pool", "both", "--k", 3, "--workers", 0)
    assert again.exit_code == 0, again.output
    assert "found in" in again.output
    document = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert (document["features"], document["knn"]["k"]) == (32, 3)


def test_other_classes_and_a_set_of_its_own_to_hold_back(trained, tmp_path):
    photos, out = trained
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    (tmp_path / "labels.csv").write_text("".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)))
    document = probe(out, str(photos), tmp_path / "a", Options(labels=str(tmp_path / "labels.csv")), say=str)
    assert document["classes"] == ["a", "b"]
    shutil.copytree(photos, tmp_path / "held")
    for path in sorted((tmp_path / "held").rglob("*.png"))[::2]:
        path.unlink()
    document = probe(out, str(photos), tmp_path / "b", Options(test=str(tmp_path / "held"), k=1), say=str)
    assert (document["learnt_from"], document["held_back"]) == (15, 7)
    assert document["knn"]["accuracy"] == 1.0  # each is among those that were learnt from
    (tmp_path / "held" / "strange").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "held" / "strange")
    with pytest.raises(ConfigError, match="--labels folders: the training part has none of 1 classes: strange"):
        probe(out, str(photos), tmp_path / "c", Options(test=str(tmp_path / "held")), say=str)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_the_share_that_is_held_back_is_the_true_one(trained, tmp_path, share):
    photos, out = trained
    lines = []
    document = probe(out, str(photos), tmp_path, Options(test_share=share), say=lines.append)
    held = 3 if share < 0.5 else 12
    assert document["held_back"] == held
    assert any(f"{held} held back ({held / 15:.1%} of all, by class, seed 0)" in line for line in lines)


def test_samples_that_are_held_back_and_learnt_from_are_told(trained, tmp_path):
    photos, out = trained
    shutil.copytree(photos, tmp_path / "other")
    for test, warned in ((photos, True), (photos / ".", True), (tmp_path / "other", False)):
        lines = []
        probe(out, str(photos), tmp_path / "probe", Options(test=str(test)), say=lines.append)
        told = [line for line in lines if line.startswith("warning: ")]
        assert len(told) == warned
        assert all(line.startswith(f"warning: --test {test}: 15 of 15 are in --data too") for line in told)


def test_an_exported_encoder_gives_the_same(trained, tmp_path):
    photos, out = trained
    export_file(out, tmp_path / "encoder.safetensors", "timm")
    whole = probe(out, str(photos), tmp_path / "whole", say=str)
    lines = []
    alone = probe(tmp_path / "encoder.safetensors", str(photos), tmp_path / "alone", say=lines.append)
    assert alone["step"] is None
    for kind in ("knn", "linear"):
        assert alone[kind] == whole[kind]


def test_a_masked_convnet(trained, tmp_path):
    photos = trained[0]
    pretrain(convnet_config("fcmae", photos, tmp_path / "run", steps=2))
    for pool, good in (("mean", True), ("cls", False)):
        result = run(tmp_path / "run", "--data", photos, "-o", tmp_path / "probe", "--pool", pool, "--workers", 0)
        assert (result.exit_code == 0) == good, result.output
    assert "--pool cls: this encoder has no class token" in result.output
    assert not (tmp_path / "probe" / "patches.png").exists()
    opened = open_recipe(tmp_path / "run")
    assert torch.equal(
        opened.recipe.model.encoder.state_dict()["stages.0.0.norm.weight"],
        open_recipe(tmp_path / "run" / "checkpoints" / "step-00000002").recipe.model.encoder.state_dict()[
            "stages.0.0.norm.weight"
        ],
    )


def test_images_in_a_tar(trained, tmp_path):
    """With classes from a file, they give what they give in a folder."""
    photos, out = trained
    with tarfile.open(tmp_path / "0000.tar", "w") as tar, open(tmp_path / "labels.csv", "w") as table:
        for path in sorted(photos.rglob("*.png")):
            tar.add(path, arcname=path.name)
            table.write(f"{path.name},{path.parent.name}\n")
    options = Options(labels=str(tmp_path / "labels.csv"))
    packed = probe(out, str(tmp_path / "0000.tar"), tmp_path / "packed", options, say=str)
    loose = probe(out, str(photos), tmp_path / "loose", options, say=str)
    assert packed["learnt_from"] == loose["learnt_from"] == 12
    names = sorted(path.name for path in photos.rglob("*.png"))
    if names == [path.name for path in sorted(photos.rglob("*.png"))]:  # the same order, the same split
        assert packed["linear"] == loose["linear"]
    with pytest.raises(ConfigError, match="a CSV file tells classes of such data"):
        probe(out, str(tmp_path / "0000.tar"), tmp_path / "packed", say=str)


def test_images_of_numbers(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (rng.random((5, 20, 20)) + 3 * (i % 2)).astype(np.float32))
    data = str(tmp_path / "data")
    pretrain(tiny_config(tmp_path / "data", tmp_path / "run", steps=2, channels=5, probe_every=2, probe_data=data))
    document = probe(tmp_path / "run", data, tmp_path / "probe", Options(baselines=True), say=str)
    assert document["knn"]["accuracy"] == float(read_rows(tmp_path / "run" / "probe.csv")[-1]["knn"])
    assert document["baselines"]["pixels"]["linear"]["accuracy"] == 1.0
    assert sorted(path.name for path in (tmp_path / "probe").glob("*.png")) == ["classes.png"]  # no colours to show


@pytest.mark.parametrize("name", ["point_mae", "colormae"])
def test_a_run_of_a_recipe(tmp_path, name):
    import importlib

    tests = importlib.import_module(f"tests.recipes.test_{name}")
    suite = next(value for key, value in vars(tests).items() if key.startswith("Test") and value.name == name)
    config = suite().config(tmp_path / "run", picture_rows=0, steps=2)
    pretrain(config)
    source = open_recipe(tmp_path / "run").data("demo", "--data", tmp_path)
    from maefast.probe.samples import fixed

    names = fixed(source).names
    (tmp_path / "labels.csv").write_text("".join(f'"{n}",{"ab"[i % 2]}\n' for i, n in enumerate(names)))
    options = Options(labels=str(tmp_path / "labels.csv"), baselines=True)
    document = probe(tmp_path / "run", "demo", tmp_path / "probe", options, say=str)
    assert document["model"]["name"] == name
    assert document["learnt_from"] + document["held_back"] == len(names)
    assert "random weights" in document["baselines"]
    assert ("pixels" in document["baselines"]) == (name == "colormae")
    before = set((tmp_path / "probe" / "features").iterdir())
    lines = []
    probe(tmp_path / "run", "demo", tmp_path / "probe", options, say=lines.append)
    assert any("found in" in line for line in lines)
    assert set((tmp_path / "probe" / "features").iterdir()) == before


def test_a_recipe_whose_teacher_is_gone(tmp_path):
    from tests.recipes.test_dmae import TestDMAE

    suite = TestDMAE()
    options = recipe_options("dmae", demo=True)
    arguments = {**options["model_args"], **suite.toy}
    pretrain(suite.config(tmp_path / "run", steps=2, picture_rows=0))
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    document = json.loads(state.read_text())
    document["config"]["model_args"] = {**arguments, "teacher": "/gone/teacher.pth"}
    state.write_text(json.dumps(document))
    assert open_recipe(tmp_path / "run").recipe.config["name"] == "dmae"


def test_images_are_read_as_the_run_read_them(tmp_path):
    photos = write_photos(tmp_path / "photos")
    pretrain(tiny_config(photos, tmp_path / "run", steps=1, value_range="10,200"))
    opened = open_recipe(tmp_path / "run")
    assert opened.data(str(photos), "--data", tmp_path).decoder.value_range == (10.0, 200.0)
    scale = {"float": 255.0}
    assert open_recipe(tmp_path / "run").scale is None
    from dataclasses import replace

    assert replace(opened, scale=scale).data(str(photos), "--data", tmp_path).decoder.scale == scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--data", "x"], "no such checkpoint"),
        (["RUN", "--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["RUN", "--data", "PHOTOS", "--test", "/nowhere"], "--test /nowhere: no such folder"),
        (["RUN", "--data", "PHOTOS", "--labels", "/nowhere.csv"], "--labels /nowhere.csv: No such file"),
        (["RUN", "--data", "PHOTOS/group0"], "lie in no folders of classes"),
        (["RUN", "--data", "PHOTOS", "--test-share", 1], "--test-share must be above 0 and below 1, not 1"),
        (["RUN", "--data", "PHOTOS", "--k", 0], "--k must be at least 1, not 0"),
        (["RUN", "--data", "PHOTOS", "--test-labels", "x.csv"], "--test-labels needs --test"),
        (["RUN", "--data", "PHOTOS", "--test", "PHOTOS", "--test-share", 0.5], "give --test or --test-share, not both"),
    ],
)
def test_errors(trained, arguments, message, tmp_path):
    photos, out = trained
    told = [str(part).replace("RUN", str(out)).replace("PHOTOS", str(photos)) for part in arguments]
    result = run(*told, "-o", tmp_path / "probe", "--workers", 0)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "probe" / "probe.json").exists()


def test_a_folder_that_takes_no_files_is_refused_at_once(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("maefast.train.probe.extract", None)  # no feature is computed
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file", "is not a folder"), (tmp_path / "probe", "may not be written to")):
        result = run(trained[1], "--data", trained[0], "-o", output)
        assert (result.exit_code, message in result.output) == (1, True), result.output
        assert result.output.startswith(f"error: --output {output}: ")
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)


def test_unreadable_samples(trained, tmp_path):
    photos, out = trained
    shutil.copytree(photos, tmp_path / "data")
    sorted((tmp_path / "data").rglob("*.png"))[0].write_bytes(b"broken")
    result = run(out, "--data", tmp_path / "data", "-o", tmp_path / "probe", "--workers", 0)
    assert result.exit_code == 1
    assert "--skip-bad" in result.output
    result = run(
        out, "--data", tmp_path / "data", "-o", tmp_path / "probe", "--workers", 0, "--skip-bad", "--baselines"
    )
    assert result.exit_code == 0, result.output
    assert "skipped unreadable image" in result.output
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["unreadable"] == 1


def test_what_holds_no_weights(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        probe(tmp_path / "a.pth", "skimage", tmp_path / "probe")


def test_options_are_checked():
    assert PretrainConfig().probe_every == 0
    with pytest.raises(ConfigError, match="--pool must be mean or cls or both or attentive, not max"):
        Options(pool="max")
