"""SparK and FCMAE in the training layer: killed and resumed, in two processes, exported, and what they refuse."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maefast.models import FCMAE, create, list_models
from maefast.models.convnames import fcmae_to_sparse
from maefast.models.resnet import ResNet
from maefast.train import CheckpointError, ConfigError, checkpoint, pretrain
from maefast.train.config import load_config
from maefast.train.export import export_file
from maefast.train.image_models import check_mask
from maefast.train.infer import infer_arguments, make_model
from maefast.train.reconstruct import reconstruct_files
from maefast.train.schedule import parameter_groups
from maefast.train.weights import Weights, load_pretrained, open_weights
from tests.train import common, victims
from tests.train.common import CREATORS, convnet_config, losses, run_process, run_together, toy_spark

KINDS = ["toy_spark", "fcmae"]


def train(kind, photos, out, **changes):
    return pretrain(convnet_config(kind, photos, out, **changes), create_model=CREATORS.get(kind))


@pytest.fixture(scope="module")
def fcmae_run(photos, tmp_path_factory):
    train("fcmae", photos, out := tmp_path_factory.mktemp("fcmae"), steps=3, mask_ratio=0.5)
    return out


@pytest.fixture(scope="module")
def spark_run(photos, tmp_path_factory):
    train("toy_spark", photos, out := tmp_path_factory.mktemp("spark"), steps=3)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(kind, photos, tmp_path):
    """Losses, weights, moments and the running statistics of batch norms are those of an undisturbed run."""
    whole, parts = (convnet_config(kind, photos, tmp_path / name) for name in ("whole", "parts"))
    assert run_process(victims.train, whole) == 0
    assert run_process(victims.train_and_die, parts, "in a step", 5) == -signal.SIGKILL
    assert run_process(victims.train, parts) == 0
    assert "4 steps done" in (tmp_path / "parts" / "log.txt").read_text()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len({loss for _, loss, _ in losses(tmp_path / "whole")}) == 6
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        one, two = (load_file(tmp_path / run / "checkpoints" / "step-00000006" / file) for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
    if kind == "toy_spark":
        one = load_file(tmp_path / "whole" / "checkpoints" / "step-00000006" / checkpoint.MODEL)
        assert one["sparse_encoder.sp_cnn.bn1.num_batches_tracked"] == 6
        assert one["dense_decoder.dec.0.conv.1.running_var"].sub(1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, photos, tmp_path):
    """With --model-arg sync_bn=true for SparK, also the running statistics; without drop path, drawn by rank."""
    arguments = {"sync_bn": True} if kind == "toy_spark" else common.FCMAE
    single = convnet_config(kind, photos, tmp_path / "one", batch_size=8, steps=4, model_args=arguments)
    double = replace(single, output_dir=str(tmp_path / "two"), batch_size=4)
    if kind == "toy_spark":
        single, double = (replace(c, model="plain_spark") for c in (single, double))
    assert run_process(victims.train, single) == 0
    assert run_together(victims.train_as, 2, double) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [float(loss) for _, loss, _ in two] == pytest.approx([float(loss) for _, loss, _ in one], rel=1e-4)
    one, two = (load_file(tmp_path / n / "checkpoints" / "step-00000004" / checkpoint.MODEL) for n in ("one", "two"))
    for name in one:
        if "running_" in name:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_two_processes_with_their_own_batch_norms(photos, tmp_path):
    assert run_together(victims.train_as, 2, convnet_config("toy_spark", photos, tmp_path / "out", steps=3)) == [0, 0]
    assert len(losses(tmp_path / "out")) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_pictures_and_what_is_left(kind, photos, tmp_path):
    result = train(
        kind,
        photos,
        tmp_path,
        steps=4,
        amp="bf16",
        picture_every=2,
        picture_rows=2,
        tensorboard=True,
        img_size=[64, 96],
    )
    assert result.step == 4
    assert np.isfinite(result.loss)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "metrics.csv", "reconstruction.png", "loss_curve.png", "tensorboard", "pictures"} <= names
    with Image.open(tmp_path / "reconstruction.png") as image:
        assert len(np.unique(np.asarray(image))) > 50
    written = load_config(tmp_path / "config.yaml")
    assert (written["mask_ratio"], written["norm_pix"]) == (0.6, True)  # the models' own
    weights = load_file(result.checkpoint / checkpoint.MODEL)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.values())


def test_the_vit_keeps_its_own_defaults(photos, tmp_path):
    pretrain(common.tiny_config(photos, tmp_path, steps=1))
    written = load_config(tmp_path / "config.yaml")
    assert (written["mask_ratio"], written["norm_pix"]) == (0.75, True)


def test_broken_running_statistics_are_not_saved(photos, tmp_path, monkeypatch):
    from maefast.train import NonFiniteLoss, loop

    original = loop.Run._step

    def step(self):
        original(self)
        if self.done == 4:
            self.model.sparse_encoder.sp_cnn.bn1.running_var[0] = float("inf")

    monkeypatch.setattr(loop.Run, "_step", step)
    with pytest.raises(NonFiniteLoss, match=r"norm of the weights is inf at step 4.*step-00000002"):
        train("toy_spark", photos, tmp_path)


def test_fcmae_export(fcmae_run, tmp_path):
    model = make_model(open_weights(fcmae_run))
    state, encoder = model.state_dict(), model.encoder.state_dict()
    lines = export_file(fcmae_run, tmp_path / "timm.safetensors", "timm")
    assert "strict=False" in lines[-1]
    tensors = load_file(tmp_path / "timm.safetensors")
    assert len(tensors) == len(encoder)
    assert torch.equal(tensors["stages.0.blocks.0.conv_dw.weight"], encoder["stages.0.0.dwconv.weight"])
    export_file(fcmae_run, tmp_path / "official.pt", "official")
    tensors = torch.load(tmp_path / "official.pt", weights_only=True)["model"]
    assert tensors.keys() == {k for k in fcmae_to_sparse(state) if k.startswith("encoder.")}
    assert tensors["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    export_file(fcmae_run, tmp_path / "mae.safetensors", "mae")
    again = make_model(open_weights(tmp_path / "mae.safetensors"))
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[key], state[key]) for key in state)
    for file in ("timm.safetensors", "official.pt"):
        fresh = create("fcmae", img_size=96, **common.FCMAE)
        load_pretrained(fresh, tmp_path / file, (said := []).append)
        assert "encoder only" in said[0]
        assert all(torch.equal(fresh.encoder.state_dict()[key], encoder[key]) for key in encoder)


def test_spark_export(spark_run, tmp_path):
    model = toy_spark("toy_spark", img_size=64)
    load_pretrained(model, spark_run, lambda line: None)
    for format in ("timm", "official"):
        export_file(spark_run, tmp_path / f"{format}.pth", format)
        state = torch.load(tmp_path / f"{format}.pth", weights_only=True)
        plain = ResNet((1, 1, 1, 1), width=8)  # timm's names: loads with strict=True where there is no classifier
        plain.load_state_dict(state, strict=True)
        images = torch.randn(2, 3, 64, 64)
        ours = model.sparse_encoder.sp_cnn.eval()(images)
        torch.testing.assert_close(plain.eval()(images), ours)
    export_file(spark_run, tmp_path / "whole.pth", "mae")
    state = torch.load(tmp_path / "whole.pth", weights_only=True)["module"]  # where SparK's own code looks
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match=r"is none of resnet50.*load_checkpoint"):
        make_model(open_weights(tmp_path / "whole.pth"))


@pytest.mark.parametrize("format", ["hf", "hf4"])
def test_huggingface_has_no_convnets(format, fcmae_run, tmp_path):
    with pytest.raises(ConfigError, match=f"--format {format} is for a ViT.*use timm, official or mae"):
        export_file(fcmae_run, tmp_path / "folder", format)
    assert not (tmp_path / "folder").exists()


def test_reconstruct_files(fcmae_run, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))[:2]
    reconstruct_files(fcmae_run, files, tmp_path / "a.png")
    reconstruct_files(fcmae_run, files, tmp_path / "b.png", norm_pix=False, mask_ratio=0.75)
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert not np.array_equal(a, b)
    with pytest.raises(ConfigError, match="leaves 0 of 4 patches visible; a larger --img-size"):
        reconstruct_files(fcmae_run, files, tmp_path / "c.png", mask_ratio=0.9)


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith(("spark_", "fcmae_"))])
def test_published_files_are_read_by_their_shapes(name):
    with torch.device("meta"):
        model = create(name, img_size=64)
    for state in (model.state_dict(), {k: v for k, v in model.state_dict().items() if "encoder." in k}):
        arguments = infer_arguments(Weights(state, None, Path("published.pth")))
        assert {key: model.config[key] for key in arguments} == arguments
        assert ("encoder" if name.startswith("spark") else "widths") in arguments


def test_init_from_and_its_complaints(fcmae_run, spark_run, photos, tmp_path):
    fresh = toy_spark("", img_size=96)
    load_pretrained(fresh, spark_run, (said := []).append)
    assert said == [f"weights from {spark_run / 'checkpoints' / 'step-00000003' / 'model.safetensors'}"]
    with pytest.raises(CheckpointError, match=r"holds a ConvNeXt V2 \(FCMAE\), and the model is a ResNet or ConvNeXt"):
        load_pretrained(fresh, fcmae_run)
    wider = FCMAE(64, 3, (1, 1, 1, 1), (8, 8, 16, 32), decoder_embed_dim=16)
    with pytest.raises(CheckpointError, match=r"encoder\.\S+ is \(16,\) in the file and \(32,\) in the model"):
        load_pretrained(wider, fcmae_run)
    train("fcmae", photos, tmp_path, steps=1, warmup=1.0, init_from=str(fcmae_run), img_size=96)
    started, want = (open_weights(path).tensors for path in (tmp_path, fcmae_run))
    assert torch.equal(started["encoder.stages.2.0.pwconv1.weight"], want["encoder.stages.2.0.pwconv1.weight"])


def test_another_model_in_the_same_folder_is_refused(fcmae_run, photos):
    with pytest.raises(CheckpointError, match=r"another model.*decoder_embed_dim: 16 -> 8"):
        train("fcmae", photos, fcmae_run, mask_ratio=0.5, model_args={**common.FCMAE, "decoder_embed_dim": 8})


def test_the_mask_follows_the_model_s_own_rule():
    with torch.device("meta"):
        spark, fcmae = toy_spark("", img_size=(32, 64)), create("fcmae", img_size=(32, 64), **common.FCMAE)
    check_mask(spark, 0.6)  # round(0.8) = 1 of two cells
    with pytest.raises(ConfigError, match=r"--mask-ratio 0\.6 leaves 0 of 2 patches visible; a larger --img-size"):
        check_mask(fcmae, 0.6)  # int(0.8) = 0


def test_mask_tokens_of_spark_do_not_decay():
    with torch.device("meta"):
        model = toy_spark("", img_size=64)
    none, decayed = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.04))
    assert all(id(token) in none for token in model.mask_tokens)
    assert id(model.sparse_encoder.sp_cnn.conv1.weight) in decayed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "spark_resnet50", "patch_size": 16}, "'spark_resnet50' has no --patch-size: it masks cells"),
        ({"model": "fcmae_convnextv2_atto", "patch_size": 16}, "has no --patch-size"),
        ({"model": "spark_resnet50", "norm_pix": False}, "has no --no-norm-pix: SparK's targets are always normalised"),
        ({"recompute": True}, "'fcmae' has no --recompute: only the mae_"),
        ({"img_size": 100}, r"img_size \(100, 100\) is no multiple of 32, the side of a cell"),
        ({"img_size": 32}, "leaves 0 of 1 patches visible; a larger --img-size has more"),
        ({"model": "spark_resnet18"}, "unknown model 'spark_resnet18'; choose from"),
        ({"model_args": {"grn_scope": "image"}}, "grn_scope must be one of"),
    ],
)
def test_options_that_make_no_sense(change, message, photos, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pretrain(convnet_config("fcmae", photos, tmp_path, **change))
    assert not any(tmp_path.iterdir())
