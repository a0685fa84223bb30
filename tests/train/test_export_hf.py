"""Hugging Face's models there and back, through the installed transformers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from maefast.models import create, load_checkpoint
from maefast.models.convert import encoder_state, mae_to_hf
from maefast.models.hf_config import arguments_of, config_of
from maefast.train import CheckpointError, ConfigError
from maefast.train.export import export_file, reconstruct_files
from maefast.train.weights import infer_arguments, load_pretrained, make_model, open_weights

transformers = pytest.importorskip("transformers")

# Nothing here follows from the shapes: heads, epsilon and targets are told by config.json alone.
ODD = {
    "img_size": [32, 32], "patch_size": [8, 8], "in_chans": 3, "embed_dim": 48, "depth": 2, "num_heads": 6,
    "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3, "mlp_ratio": 2.0, "norm_pix_loss": True,
    "norm_eps": 1e-5,
}  # fmt: skip
ENCODERS = ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling", "ViTMAEModel")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create("mae", **ODD)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The folder that ViTMAEForPreTraining.save_pretrained writes."""
    twin = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**config_of(model.config, whole=True)))
    layout = "5" if any("q_proj" in name for name in twin.state_dict()) else "4"
    twin.load_state_dict(mae_to_hf(model.state_dict(), layout), strict=True)
    folder = tmp_path_factory.mktemp("hf")
    twin.save_pretrained(folder)
    return folder


def equal(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_a_saved_vitmae_is_a_source(model, saved):
    weights = open_weights(saved)
    assert equal(weights.tensors, model.state_dict())
    rebuilt = make_model(weights)
    assert {k: v for k, v in rebuilt.config.items() if k in ODD} == ODD
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    twin = transformers.ViTMAEForPreTraining.from_pretrained(saved).eval()
    with torch.no_grad():
        want = twin(images, noise=noise)
        loss, pred, _ = rebuilt.eval()(images, noise=noise, pred="full")
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(pred, want.logits, rtol=1e-4, atol=1e-5)


def test_every_command_reads_it(model, saved, tmp_path):
    export_file(saved, tmp_path / "encoder.safetensors", "timm")
    assert equal(open_weights(tmp_path / "encoder.safetensors").tensors, encoder_state(model.state_dict()))
    export_file(saved / "model.safetensors", tmp_path / "all.pth", "mae")  # the file itself, config.json beside it
    assert equal(open_weights(tmp_path / "all.pth").tensors, model.state_dict())
    Image.new("RGB", (40, 40), (200, 90, 10)).save(tmp_path / "image.png")
    reconstruct_files(saved, [tmp_path / "image.png"], tmp_path / "out.png")
    said = []
    fresh = create("mae", **ODD)
    load_pretrained(fresh, saved, said.append)
    assert equal(fresh.state_dict(), model.state_dict())
    assert said == [f"weights from {saved}"]


@pytest.mark.parametrize("format", ["hf", "hf4"])
def test_encoders_there_and_back(model, saved, format, tmp_path):
    export_file(saved, tmp_path / "vit", format)
    vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert (vit.config.num_attention_heads, vit.config.layer_norm_eps) == (6, 1e-5)
    vit.save_pretrained(tmp_path / "back")
    weights = open_weights(tmp_path / "back")
    assert equal(weights.tensors, encoder_state(model.state_dict()))
    got = infer_arguments(weights)
    assert {key: got[key] for key in got if key in ODD} == {key: ODD[key] for key in got if key in ODD}
    assert got["num_heads"] == 6


def test_whole_models_there_and_back(model, saved, tmp_path):
    lines = export_file(saved, tmp_path / "mae", "hf-mae")
    assert lines[-1] == f'load it with ViTMAEForPreTraining.from_pretrained("{tmp_path / "mae"}")'
    twin, report = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mae", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images, noise=noise).loss, model(images, noise=noise)[0])
    twin.save_pretrained(tmp_path / "back")
    assert equal(open_weights(tmp_path / "back").tensors, model.state_dict())
    assert arguments_of(json.loads((tmp_path / "back" / "config.json").read_text())) == {
        key: value for key, value in model.config.items() if key not in ("name", "positions")
    }


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_every_kind_are_read(model, kind, tmp_path):
    """Heads of classifiers, poolers and SimMIM's decoder are left out."""
    config = config_of(model.config, whole="MAE" in kind)
    config.pop("architectures")
    if "MAE" in kind:
        theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(**config))
    else:
        theirs = getattr(transformers, kind)(transformers.ViTConfig(**config))
    theirs.save_pretrained(tmp_path / "vit")
    weights = open_weights(tmp_path / "vit")
    assert weights.tensors.keys() == encoder_state(model.state_dict()).keys()
    assert infer_arguments(weights)["num_heads"] == 6
    fresh = create("mae", **{**ODD, "positions": "learned"})
    load_checkpoint(fresh, tmp_path / "vit", part="encoder")
    assert equal(encoder_state(fresh.state_dict()), weights.tensors)
    with pytest.raises(ConfigError, match="holds an encoder only"):
        export_file(tmp_path / "vit", tmp_path / "mae", "hf-mae")


def test_models_that_are_computed_otherwise_are_refused(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    for change, text in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"decoder_intermediate_size": 100}, "MLPs of its decoder are 100 wide"),
    ):
        folder = tmp_path / text[:6].strip()
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=text):
            open_weights(folder)


def test_rectangles_go_to_vit_alone(tmp_path):
    model = create("mae", **{**ODD, "img_size": [16, 40]})
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="square images only"):
        export_file(tmp_path / "weights.pth", tmp_path / "mae", "hf-mae", "mae_tiny")
    export_file(tmp_path / "weights.pth", tmp_path / "vit", "hf", "mae_tiny")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["image_size"] == [16, 40]


# --- sizes of published files: no configuration, only tensors ------------------------------------------------


def published(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


def test_the_size_of_a_published_file(tmp_path):
    """The issue's case: 4 x 9 patches are no 6 x 6."""
    model = create("mae", **{**ODD, "img_size": [64, 144], "patch_size": 16})
    path = published(model, tmp_path / "weights.pth")
    assert make_model(open_weights(path), "mae_tiny").img_size == (64, 144)
    export_file(path, tmp_path / "vit", "hf", "mae_tiny")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["image_size"] == [64, 144]
    with pytest.raises(ConfigError, match="of a model for 64 x 144 pixels"):
        infer_arguments(open_weights(path), "mae_tiny", img_size=96)


def test_learned_positions_do_not_tell_the_size(tmp_path):
    model = create("mae", **{**ODD, "img_size": [64, 144], "patch_size": 16, "positions": "learned"})
    path, said = published(model, tmp_path / "weights.pth"), []
    assert infer_arguments(open_weights(path), "mae_tiny", [64, 144], said.append)["img_size"] == [64, 144]
    assert said == []
    assert infer_arguments(open_weights(path), "mae_tiny", None, said.append)["img_size"] == [96, 96]
    (line,) = said
    assert "36 learned positions are taken for a square, images of 96 x 96 (see --img-size)" in line
    with pytest.raises(ConfigError, match=r"has 6 x 7 patches of 16 x 16; .* holds positions of 36"):
        infer_arguments(open_weights(path), "mae_tiny", [96, 112])
    model = create("mae", **{**ODD, "img_size": [16, 40], "positions": "learned"})
    path = published(model, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"10 patches are not a square.*give --img-size"):
        infer_arguments(open_weights(path), "mae_tiny")
    assert make_model(open_weights(path), "mae_tiny", img_size=[16, 40]).grid_size == (2, 5)
