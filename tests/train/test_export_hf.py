"""Hugging Face's models there and back, through the installed transformers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maefast.models import create, load_checkpoint
from maefast.models.convert import encoder_state, mae_to_hf
from maefast.models.hf_config import arguments_of, config_of
from maefast.train import CheckpointError, ConfigError
from maefast.train.export import export_file
from maefast.train.infer import infer_arguments, make_model
from maefast.train.reconstruct import reconstruct_files
from maefast.train.weights import load_pretrained, open_weights

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
        ({"model_type": "vit_msn"}, "model_type is 'vit_msn'; maefast reads"),
        ({"model_type": None}, "model_type is None"),
        ({"image_size": {"height": 32}}, "a size is .*neither a number nor two"),
        ({"decoder_intermediate_size": 100}, "MLPs of its decoder are 100 wide"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=text):
            open_weights(folder)


def test_a_broken_configuration_is_named(saved, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Expecting property name"):
        open_weights(tmp_path)
    state = {"model": create("mae", **ODD).state_dict()}
    torch.save(state, tmp_path / "other.pth")  # not of Hugging Face: what lies beside it is no matter
    assert open_weights(tmp_path / "other.pth").config is None


def test_what_is_no_plain_vit_is_not_written_as_one(model, saved, tmp_path):
    """Names that are shared, and more, or fewer; a configuration that lies."""
    state = model.state_dict()
    without = {key: value for key, value in state.items() if key not in ("norm.bias", "blocks.1.attn.qkv.bias")}
    moved = {key.replace("blocks.1.", "blocks.7."): value for key, value in state.items()}
    for changed, what in (
        (state | {"blocks.0.ls1.gamma": torch.ones(48)}, r"blocks\.0\.ls1\.gamma is unknown"),
        (without, r"norm\.bias is missing"),
        (moved, r"blocks\.1\.attn\.\S+ is missing"),
        ({key: value for key, value in state.items() if not key.startswith("blocks.0.")}, "is missing"),
    ):
        torch.save({"model": changed}, tmp_path / "weights.pth")
        for format in ("hf", "hf-mae"):
            with pytest.raises(CheckpointError, match=rf"does not hold a plain ViT.*{what}"):
                export_file(tmp_path / "weights.pth", tmp_path / "out", format, heads=HEADS)
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    for lie in (
        {"image_size": 224},
        {"num_hidden_layers": 3},
        {"intermediate_size": 48, "decoder_intermediate_size": 24},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **lie}))
        with pytest.raises(CheckpointError, match="does not hold a plain ViT"):
            export_file(tmp_path, tmp_path / "out", "hf")


def test_rectangles_go_to_vit_alone(tmp_path):
    model = create("mae", **{**ODD, "img_size": [16, 40]})
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="square images only"):
        export_file(tmp_path / "weights.pth", tmp_path / "mae", "hf-mae", heads=HEADS)
    export_file(tmp_path / "weights.pth", tmp_path / "vit", "hf", heads=HEADS)
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["image_size"] == [16, 40]


# --- sizes of published files: no configuration, only tensors ------------------------------------------------


def published(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


HEADS = [6, 3]


def test_the_size_of_a_published_file(tmp_path):
    """The issue's case: 4 x 9 patches are no 6 x 6."""
    model = create("mae", **{**ODD, "img_size": [64, 144], "patch_size": 16})
    path = published(model, tmp_path / "weights.pth")
    assert make_model(open_weights(path), heads=HEADS).img_size == (64, 144)
    export_file(path, tmp_path / "vit", "hf", heads=HEADS)
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["image_size"] == [64, 144]
    with pytest.raises(ConfigError, match="of a model for 64 x 144 pixels"):
        infer_arguments(open_weights(path), heads=HEADS, img_size=96)


def test_guesses_are_told(tmp_path):
    model = create("mae", **{**ODD, "embed_dim": 192, "num_heads": 12, "decoder_embed_dim": 64, "decoder_num_heads": 4})
    path, said = published(model, tmp_path / "weights.pth"), []
    assert infer_arguments(open_weights(path), say=said.append)["num_heads"] == 3
    assert "the file does not tell the heads; taken are 3, 2 in the decoder, the usual (see --heads)" in said[0]
    assert make_model(open_weights(path), heads=[12, 4]).config["num_heads"] == 12
    with pytest.raises(ConfigError, match=r"--heads 12: .* has a decoder too"):
        infer_arguments(open_weights(path), heads=[12])
    with pytest.raises(ConfigError, match=r"--model spark_resnet50: .* holds a ViT"):
        infer_arguments(open_weights(path), "spark_resnet50")
    infer_arguments(open_weights(path), "mae_large", say=said.append)
    assert "its widths are not those of mae_large" in said[-1]


def test_our_own_files_say_it_all(model, tmp_path):
    """There and back through each of our formats: heads and epsilon show in no shape."""
    config = {**model.config, "name": "mae"}
    save_file(model.state_dict(), tmp_path / "run.safetensors", {"maefast": json.dumps(config)})
    for name, format in (("a.pth", "mae"), ("b.safetensors", "mae"), ("c.pth", "official"), ("d.safetensors", "timm")):
        lines = export_file(tmp_path / "run.safetensors", tmp_path / name, format)
        assert "build its model with 6 heads and norms with an epsilon of 1e-05" in lines
        weights = open_weights(tmp_path / name)
        assert weights.config == config
        assert weights.has_decoder == (format != "timm")
    lines = export_file(tmp_path / "run.safetensors", tmp_path / "e.safetensors", "hf")
    assert "layer_norm_eps=1e-05 and num_attention_heads=6" in lines[1]
    with pytest.raises(ConfigError, match=r"--heads 3: .* says 6"):
        infer_arguments(open_weights(tmp_path / "a.pth"), heads=[3, 3])
    with pytest.raises(ConfigError, match=r"--model mae_tiny: .* is of a model with num_heads 6, not 3"):
        infer_arguments(open_weights(tmp_path / "a.pth"), "mae_tiny")
    with pytest.raises(ConfigError, match=r"--model spark_resnet50: .* is of the kind mae"):
        infer_arguments(open_weights(tmp_path / "a.pth"), "spark_resnet50")
    for text in ("[1]", '"x"', "3", "{"):
        save_file(model.state_dict(), tmp_path / "odd.safetensors", {"maefast": text})
        with pytest.raises(CheckpointError, match=r"describes no model|cannot be read"):
            open_weights(tmp_path / "odd.safetensors")


def test_learned_positions_do_not_tell_the_size(tmp_path):
    model = create("mae", **{**ODD, "img_size": [64, 144], "patch_size": 16, "positions": "learned"})
    path, said = published(model, tmp_path / "weights.pth"), []
    assert infer_arguments(open_weights(path), None, [64, 144], HEADS, said.append)["img_size"] == [64, 144]
    assert said == []
    assert infer_arguments(open_weights(path), None, None, HEADS, said.append)["img_size"] == [96, 96]
    (line,) = said
    assert "36 learned positions are taken for a square, images of 96 x 96 (see --img-size)" in line
    with pytest.raises(ConfigError, match=r"has 6 x 7 patches of 16 x 16; .* holds positions of 36"):
        infer_arguments(open_weights(path), None, [96, 112], HEADS)
    model = create("mae", **{**ODD, "img_size": [16, 40], "positions": "learned"})
    path = published(model, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"10 patches are not a square.*give --img-size"):
        infer_arguments(open_weights(path), heads=HEADS)
    assert make_model(open_weights(path), img_size=[16, 40], heads=HEADS).grid_size == (2, 5)
