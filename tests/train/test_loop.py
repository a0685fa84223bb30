"""Runs as a user sees them: what is refused, what stops them, what they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.models import create
from maefast.train import BadImage, ConfigError, NonFiniteLoss, TrainError, checkpoint, loop, pretrain
from maefast.train.config import PretrainConfig, load_config
from maefast.train.parse import parse_model_args, parse_size
from tests.train.common import TINY, losses, rows, tiny_config, write_photos


def test_training_lowers_the_loss_and_leaves_its_results(photos, tmp_path):
    config = tiny_config(
        photos, tmp_path, steps=60, picture_every=20, picture_rows=3, tensorboard=True, norm_pix=False, keep=2
    )
    result = pretrain(config)
    table = [float(row["loss"]) for row in rows(tmp_path)]
    assert np.mean(table[-10:]) < 0.8 * np.mean(table[:5])
    assert (result.step, result.total, result.stopped, result.bad) == (60, 60, None, {})
    assert result.loss == table[-1]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "metrics.csv", "reconstruction.png", "loss_curve.png", "tensorboard", "pictures"} <= names
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step-00000020.png", "step-00000040.png"]
    assert [step for step, _ in checkpoint.listing(tmp_path / "checkpoints")] == [57, 60]
    with Image.open(tmp_path / "loss_curve.png") as image:
        assert image.width > 400
    for row in rows(tmp_path):
        assert 0 <= float(row["data_wait"]) <= 1
        assert float(row["images_per_s"]) > 0
    assert float(rows(tmp_path)[-1]["epoch"]) == pytest.approx(24.0)


def test_the_loss_is_that_of_the_model_on_the_addressed_samples(photos, tmp_path):
    """Step 1 worked out again from the public parts, without the loop."""
    from maefast.data.images.augment import Augment
    from maefast.data.images.batch import normalise, normaliser
    from maefast.data.images.files import find_images
    from maefast.data.images.pixels import Decoder
    from maefast.data.images.samples import TrainImages
    from maefast.seeds import mask_noise, permutation

    config = tiny_config(photos, tmp_path, steps=1, seed=5)
    pretrain(config)
    torch.manual_seed(5)
    model = create("mae", img_size=16, patch_size=4, norm_pix_loss=True, **TINY)
    data = TrainImages(find_images(photos), Augment((16, 16)), Decoder(), seed=5, skip_bad=False, cache=0)
    order = permutation(5, 0, 10)
    samples = [data[(p, 0, int(order[p]))] for p in range(4)]
    images = normalise(torch.stack([s[0] for s in samples]), *normaliser(3))
    loss = model(images, 0.75, noise=torch.from_numpy(np.stack([mask_noise(5, p, 16) for p in range(4)])))[0]
    assert float(rows(tmp_path)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-6)


def test_seeds_matter_and_repeat(photos, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tiny_config(photos, tmp_path / name, steps=3, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_bf16_autocast_trains_near_float32(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path / "full", steps=4))
    pretrain(tiny_config(photos, tmp_path / "half", steps=4, amp="bf16"))
    full, half = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in ("full", "half"))
    assert half == pytest.approx(full, rel=0.03)
    assert half != full


def test_non_finite_loss_stops_and_the_last_checkpoint_is_good(photos, tmp_path, monkeypatch):
    original = loop.Run._step

    def step(self):
        if self.done == 7:  # the 8th step sees a poisoned model
            with torch.no_grad():
                self.model.decoder_pred.bias[0] = float("nan")
        original(self)

    monkeypatch.setattr(loop.Run, "_step", step)
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 8.*step-00000006") as error:
        pretrain(tiny_config(photos, tmp_path, save_every=2))
    assert (error.value.step, error.value.checkpoint.name) == (8, "step-00000006")
    assert checkpoint.latest(tmp_path / "checkpoints") == (error.value.checkpoint, [])
    for tensor in checkpoint.load_weights(error.value.checkpoint / "model.safetensors").values():
        assert tensor.isfinite().all()
    assert [row["loss"] for row in rows(tmp_path)][-1] == "nan"
    monkeypatch.setattr(loop.Run, "_step", original)
    assert pretrain(tiny_config(photos, tmp_path)).step == 12  # and the run goes on from it
    pretrain(tiny_config(photos, tmp_path / "untouched"))
    assert losses(tmp_path) == losses(tmp_path / "untouched")


def test_infinite_gradients_behind_a_finite_loss_are_not_saved(photos, tmp_path, monkeypatch):
    original = loop.Run._step

    def step(self):
        original(self)
        if self.done == 6:
            with torch.no_grad():
                self.model.decoder_pred.bias[0] = float("inf")

    monkeypatch.setattr(loop.Run, "_step", step)
    with pytest.raises(NonFiniteLoss, match=r"norm of the weights is inf at step 6.*step-00000003"):
        pretrain(tiny_config(photos, tmp_path))
    assert checkpoint.latest(tmp_path / "checkpoints")[0].name == "step-00000003"


def test_a_full_disk_leaves_the_last_checkpoint(photos, tmp_path, monkeypatch):
    original = checkpoint.save_file

    def save_file(tensors, path, *rest, **more):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, *rest, **more)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(TrainError, match=r"step 6 cannot be written.*No space left.*step-00000003"):
        pretrain(tiny_config(photos, tmp_path))
    assert checkpoint.latest(tmp_path / "checkpoints")[0].name == "step-00000003"


def test_non_finite_before_any_checkpoint(photos, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"no checkpoint had been written yet.*a lower --lr, "):
        pretrain(tiny_config(photos, tmp_path, steps=40, lr=1e30, warmup=0, save_every=100, norm_pix=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_with_its_path(tmp_path, workers):
    folder = write_photos(tmp_path / "photos")
    bad = folder / "group1" / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(BadImage, match=r"group1/broken\.jpg.*--skip-bad") as error:
        pretrain(tiny_config(folder, tmp_path / "out", workers=workers))
    assert error.value.path == bad


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_bad_counts_and_goes_on(tmp_path, workers, capsys):
    folder = write_photos(tmp_path / "photos")
    bad = [folder / "group1" / name for name in ("broken.jpg", "image99.png")]
    for path in bad:
        path.write_bytes(b"broken")
    result = pretrain(tiny_config(folder, tmp_path / "out", workers=workers, skip_bad=True, picture_rows=12))
    assert set(result.bad) == {str(path) for path in bad}
    text = capsys.readouterr().out
    assert "2 unreadable image(s) met and skipped" in text
    assert all(str(path) in text for path in bad)
    assert (tmp_path / "out" / "reconstruction.png").exists()


def test_only_unreadable_images(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(TrainError, match=r"none of the 3 images can be read.*\.jpg"):
        pretrain(tiny_config(tmp_path, tmp_path / "out", skip_bad=True))


def test_fewer_images_than_a_batch_and_smaller_than_the_crop(tmp_path):
    folder = write_photos(tmp_path / "photos", count=1)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(folder / "tiny.png")
    result = pretrain(tiny_config(folder, tmp_path / "out", steps=2, batch_size=8))
    assert result.step == 2
    assert float(rows(tmp_path / "out")[-1]["epoch"]) == 8.0


def test_epochs_become_steps(photos, tmp_path):
    assert pretrain(tiny_config(photos, tmp_path / "a", steps=None, epochs=3)).total == 8  # 30 images in batches of 4
    assert pretrain(tiny_config(photos, tmp_path / "b", steps=None, epochs=1, batch_size=64)).total == 1


def test_grey_models_and_sizes_that_are_not_square(photos, tmp_path):
    config = tiny_config(photos, tmp_path, steps=2, img_size=[8, 24], picture_rows=2)
    config.model_args = {**TINY, "in_chans": 1}
    pretrain(config)
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "checkpoints")[0])
    assert (state.model_config["in_chans"], state.model_config["img_size"]) == (1, [8, 24])
    with pytest.raises(TrainError, match="the model wants 4"):
        pretrain(tiny_config(photos, tmp_path / "b", model_args={**TINY, "in_chans": 4}))


def test_recompute_changes_memory_not_numbers(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path / "a", steps=3))
    pretrain(tiny_config(photos, tmp_path / "b", steps=3, recompute=True))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"batch_size": 2.5}, "--batch-size must be int, not 2.5"),
        ({"steps": "9"}, "--steps must be int, not '9'"),
        ({"mask_ratio": 1.0}, "--mask-ratio must lie strictly between"),
        ({"mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
        ({"img_size": 18}, "--img-size 18 is not a multiple of --patch-size 4"),
        ({"crop_scale": (0.5, 0.2)}, "--crop-scale needs"),
        ({"crop_ratio": (0.0, 1.0)}, "--crop-ratio needs"),
        ({"flip": 2.0}, "--flip is a probability"),
        ({"amp": "fp16"}, "--amp fp16 needs a GPU"),
        ({"amp": "fp8"}, "--amp must be no, bf16 or fp16"),
        ({"lr": float("nan")}, "--lr must be positive"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is above the peak"),
        ({"clip": 0.0}, "--clip must be positive"),
        ({"seed": -1}, "--seed must lie in"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"model": "mae_giant"}, "unknown model 'mae_giant'"),
        ({"model_args": {"width": 3}}, "takes no width; its arguments .* are img_size, "),
        ({"model_args": {**TINY, "num_heads": 3}}, "cannot be built"),
        ({"init_from": "/nowhere.pth"}, "no such checkpoint"),
        ({"init_from": "a", "resume": "b"}, "give --init-from or --resume PATH, not both"),
        ({"resume": "/nowhere"}, "no checkpoint found at /nowhere"),
    ],
)
def test_options_that_make_no_sense(change, message, photos, tmp_path):
    config = tiny_config(photos, tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(TrainError, match=message):
        pretrain(config)
    assert not any(tmp_path.iterdir())  # refused before anything is written


def test_config_file_round_trip(tmp_path):
    config = tiny_config(tmp_path, tmp_path, crop_scale=(0.5, 0.9), img_size=[8, 16])
    config.dump(tmp_path / "config.yaml", steps=12)
    assert PretrainConfig(**load_config(tmp_path / "config.yaml")) == config
    (tmp_path / "config.json").write_text('{"batch_size": 7}')
    assert PretrainConfig(**load_config(tmp_path / "config.json")).batch_size == 7
    (tmp_path / "bad.yaml").write_text("batchsize: 7")
    with pytest.raises(ConfigError, match="unknown names batchsize"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "worse.yaml").write_text("a: [")
    for name, message in (("worse.yaml", "not valid"), ("none.yaml", "No such file")):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)


def test_numbers_in_yaml(tmp_path):
    """YAML 1.1 takes 1e-3 for text, and 1e5 is no int in any."""
    text = (
        "blr: 1e-3\nlr: 2.5E+0\nweight_decay: .5e-1\nsteps: 1e5\ncrop_scale: [2e-1, 1]\nmodel_args: {norm_eps: 1e-6}\n"
    )
    (tmp_path / "config.yaml").write_text(text + "data: 1e3x\nseed: 7\n")
    config = PretrainConfig(**load_config(tmp_path / "config.yaml"))
    config.check()
    assert (config.blr, config.lr, config.weight_decay, config.steps, config.seed) == (1e-3, 2.5, 0.05, 100000, 7)
    assert type(config.steps) is int
    assert config.crop_scale == (0.2, 1)
    assert config.model_args == {"norm_eps": 1e-6}
    assert config.data == "1e3x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_scale: 0.5", "--crop-scale wants two numbers, not 0.5"),
        ("crop_scale: [a, b]", "--crop-scale wants two numbers"),
        ("crop_scale: 0.2,1.0", "--crop-scale wants two numbers, not '0.2,1.0'"),
        ("model_args: 5", "model_args wants names and values"),
        ("data: null", "--data must be a name, not None"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**load_config(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(ConfigError, match="no text"):
        load_config(tmp_path / "config.yaml")


def test_model_arguments_and_sizes():
    assert parse_model_args(["depth=4", "mlp_ratio=2.5", "positions=learned", "x=True"]) == {
        "depth": 4, "mlp_ratio": 2.5, "positions": "learned", "x": True,
    }  # fmt: skip
    for wrong in ("depth", "=4", "a-b=1"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_model_args([wrong])
    assert (parse_size("64"), parse_size("64x128")) == (64, [64, 128])
    for wrong in ("64x", "x", "8x8x8", "-3", "1.5"):
        with pytest.raises(ConfigError, match="--img-size wants"):
            parse_size(wrong)
