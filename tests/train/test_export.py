"""Export and reconstruction: the weights really load elsewhere and give the same features."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maefast.data.images import pictures
from maefast.errors import BadImage
from maefast.models import create
from maefast.models.hf_config import config_of
from maefast.train import CheckpointError, ConfigError, pretrain
from maefast.train.export import export_file
from maefast.train.infer import infer_arguments, make_model
from maefast.train.reconstruct import reconstruct_files
from maefast.train.weights import load_pretrained, open_weights
from tests.data.sources import write_images, write_shards
from tests.train.common import tiny_config

SMALL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "decoder_embed_dim": 64,
    "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run of a few steps, at a rate that moves every weight."""
    out = tmp_path_factory.mktemp("run")
    pretrain(tiny_config(photos, out, steps=3, img_size=32, patch_size=8, norm_pix=False, model_args={
        key: value for key, value in SMALL.items() if key not in ("img_size", "patch_size")
    }))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def model(run):
    return make_model(open_weights(run)).eval()


def published(model, path, encoder_only=False, **more):
    """A file as facebookresearch/mae publishes them."""
    tensors = {k: v for k, v in model.state_dict().items() if not (encoder_only and k.startswith(("decoder", "mask_")))}
    torch.save({"model": tensors, **more}, path)
    return path


# What timm.create_model("vit_base_patch16_224", num_classes=0).state_dict() holds, worked out for width w, depth d.
def timm_names(w, d, patch, patches, channels=3):
    names = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, patches + 1, w),
        "patch_embed.proj.weight": (w, channels, patch, patch),
        "patch_embed.proj.bias": (w,),
        "norm.weight": (w,),
        "norm.bias": (w,),
    }
    for i in range(d):
        for name, shape in {
            "norm1.weight": (w,), "norm1.bias": (w,), "attn.qkv.weight": (3 * w, w), "attn.qkv.bias": (3 * w,),
            "attn.proj.weight": (w, w), "attn.proj.bias": (w,), "norm2.weight": (w,), "norm2.bias": (w,),
            "mlp.fc1.weight": (4 * w, w), "mlp.fc1.bias": (4 * w,), "mlp.fc2.weight": (w, 4 * w), "mlp.fc2.bias": (w,),
        }.items():  # fmt: skip
            names[f"blocks.{i}.{name}"] = shape
    return names


def test_timm_names_and_shapes(run, model, tmp_path):
    (line,) = export_file(run, tmp_path / "encoder.safetensors", "timm")
    assert "timm names" in line
    tensors = load_file(tmp_path / "encoder.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == timm_names(192, 2, 8, 16)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_timm_names_of_vit_base(tmp_path):
    with torch.device("meta"):
        state = create("mae_base").state_dict()
    weights = {name: torch.zeros(tensor.shape, dtype=torch.uint8) for name, tensor in state.items()}
    save_file(weights, tmp_path / "base.safetensors")
    export_file(tmp_path / "base.safetensors", tmp_path / "out" / "encoder.pth", "timm")
    tensors = torch.load(tmp_path / "out" / "encoder.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == timm_names(768, 12, 16, 196)


@pytest.mark.parametrize("layout", ["hf", "hf4"])
def test_huggingface_loads_the_folder_and_gives_our_features(run, model, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    lines = export_file(run, tmp_path / "vit", layout)
    assert "from_pretrained" in lines[-1]
    vit, report = transformers.ViTModel.from_pretrained(
        tmp_path / "vit", add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = vit.eval()(images, output_hidden_states=True)
        ours = model.encode(images)
    torch.testing.assert_close(theirs.last_hidden_state, ours, rtol=1e-4, atol=1e-5)
    blocks = model.encode_visible(images).shape[1]
    assert len(theirs.hidden_states) == 3
    assert theirs.hidden_states[0].shape == (3, blocks, 192)
    assert (theirs.hidden_states[1] - theirs.hidden_states[0]).abs().max() > 0.1  # the blocks do something
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    processor = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}


def test_huggingface_strict_state_dict_of_a_single_file(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    export_file(run, tmp_path / "vit.safetensors", "hf")
    config = transformers.ViTConfig(**config_of(infer_arguments(open_weights(run))))
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    names = set(vit.state_dict())
    if any(name.startswith("encoder.layer") for name in names):
        pytest.skip("transformers 4 has the other layout")
    vit.load_state_dict(load_file(tmp_path / "vit.safetensors"), strict=True)


def test_the_4_layout_has_the_4_names(run, tmp_path):
    export_file(run, tmp_path / "vit.safetensors", "hf4")
    names = set(load_file(tmp_path / "vit.safetensors"))
    for name in (
        "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.1.attention.attention.query.weight", "encoder.layer.1.attention.attention.value.bias",
        "encoder.layer.0.attention.output.dense.bias", "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight", "encoder.layer.0.layernorm_before.weight", "layernorm.bias",
    ):  # fmt: skip
        assert name in names
    assert len(names) == 2 * 16 + 6


def test_mae_format_goes_there_and_back(run, model, tmp_path):
    export_file(run, tmp_path / "all.pth", "mae")
    state = torch.load(tmp_path / "all.pth", weights_only=True)["model"]
    create("mae", **SMALL).load_state_dict(state, strict=True)
    export_file(run, tmp_path / "all.safetensors", "mae")
    again = make_model(open_weights(tmp_path / "all.safetensors"))
    assert again.config == model.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_published_files_are_read_by_their_shapes(tmp_path):
    torch.manual_seed(0)
    model = create("mae", **{**SMALL, "num_heads": 3, "decoder_num_heads": 2})
    arguments = argparse.Namespace(mask_ratio=0.75, norm_pix_loss=True)
    path = published(model, tmp_path / "mae.pth", optimizer={"state": {}}, epoch=3, args=arguments)
    weights = open_weights(path)
    assert weights.config is None
    again = make_model(weights, norm_pix=True)
    assert {k: again.config[k] for k in SMALL} == {k: model.config[k] for k in SMALL}
    assert again.config["norm_pix_loss"]
    images = torch.randn(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            again(images, noise=noise, pred="full")[1], model(images, noise=noise, pred="full")[1]
        )


def test_base_large_and_huge_have_their_heads(tmp_path):
    for name in ("mae_base", "mae_large", "mae_huge"):
        with torch.device("meta"):
            model = create(name)
            weights = open_weights_of(model)
        arguments = infer_arguments(weights)
        assert {key: model.config[key] for key in arguments} == arguments


def open_weights_of(model):
    from pathlib import Path

    from maefast.train.weights import Weights

    return Weights(dict(model.state_dict()), None, Path("published.pth"))


def test_unknown_widths_need_a_model_name():
    with torch.device("meta"):
        weights = open_weights_of(create("mae", **{**SMALL, "embed_dim": 96}))
    with pytest.raises(ConfigError, match="number of heads of a 96-wide encoder is unknown; give --heads or --model"):
        infer_arguments(weights)
    assert infer_arguments(weights, "mae_tiny")["num_heads"] == 3


def test_encoder_only_files(model, tmp_path):
    path = published(model, tmp_path / "encoder.pth", encoder_only=True)
    with pytest.raises(CheckpointError, match="encoder only; a reconstruction needs the decoder"):
        make_model(open_weights(path))
    export_file(path, tmp_path / "vit", "hf")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["num_attention_heads"] == 3


def test_init_from(run, model, photos, tmp_path):
    said = []
    fresh = create("mae", **SMALL)
    before = fresh.decoder_pred.weight.clone()
    load_pretrained(fresh, published(model, tmp_path / "encoder.pth", encoder_only=True), said.append)
    assert torch.equal(fresh.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    assert torch.equal(fresh.decoder_pred.weight, before)
    assert "encoder only" in said[0]
    load_pretrained(fresh, run, said.append)
    assert torch.equal(fresh.decoder_pred.weight, model.decoder_pred.weight)
    # Another image size: fixed position tables stay the model's own.
    bigger = create("mae", **{**SMALL, "img_size": 48})
    table = bigger.pos_embed.clone()
    load_pretrained(bigger, run, said.append)
    assert torch.equal(bigger.pos_embed, table)
    assert torch.equal(bigger.norm.weight, model.norm.weight)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.\S+ is missing"):
        load_pretrained(create("mae", **{**SMALL, "depth": 3}), run, said.append)
    with pytest.raises(CheckpointError, match=r"proj\.bias is \(192,\) in the file and \(96,\) in the model"):
        load_pretrained(create("mae", **{**SMALL, "embed_dim": 96}), run, said.append)
    config = tiny_config(photos, tmp_path / "out", steps=1, img_size=32, patch_size=8, warmup=1.0, init_from=str(run))
    config.model_args = {key: value for key, value in SMALL.items() if key not in ("img_size", "patch_size")}
    pretrain(config)  # lr 0 in the first warm-up step: the weights are those it started from
    started = open_weights(tmp_path / "out").tensors
    assert torch.equal(started["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_weights(tmp_path / "none.pth")
    good = tmp_path / "good.pth"
    torch.save({"cls_token": torch.zeros(1000)}, good)
    for content, what in (
        (b"", "has 0 bytes"),
        (b"hello, this is text", "begins with b'hello, this is t"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull fetches the file"),
        (b"\x1f\x8b\x08\x00 and so on", "compressed by gzip"),
        (good.read_bytes()[:2000], "cannot be read as weights"),
    ):
        for name in ("a.pth", "a.safetensors", "a"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=what) as caught:
                open_weights(tmp_path / name)
            assert "weights_only=False" not in str(caught.value)
    torch.save({"model": {"conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no masked autoencoder\. In it: 1 tensors \(conv1\.weight\)\nTried: "):
        open_weights(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        open_weights(tmp_path)


def test_a_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": {"cls_token": torch.zeros(1)}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth holds an object of io\.open, which is not loaded"):
        open_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_reconstruct_files_is_repeatable_and_follows_the_seed(run, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))[:3]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        reconstruct_files(run, files, tmp_path / f"{name}.png", seed=seed)
    one, two, other = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    with pytest.raises(ConfigError, match="leaves 0 of 16"):
        reconstruct_files(run, files, tmp_path / "d.png", mask_ratio=0.999)


def test_reconstruct_does_not_overwrite_an_image(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "images")
    file = write_images(tmp_path / "images")[0]
    before = file.read_bytes()
    monkeypatch.chdir(file.parent)
    for given in (file, file.name, tmp_path / "link" / file.relative_to(tmp_path / "images"), tmp_path / "images"):
        with pytest.raises(ConfigError, match="is one of the images: give another name"):
            reconstruct_files(run, [str(given)], file, count=100)
    assert file.read_bytes() == before


def test_reconstruct_says_what_is_not_looked_at(run, photos, tmp_path, capsys):
    files = sorted(photos.rglob("*.png"))[:1]
    with pytest.raises(ConfigError, match="--column x is for tables and tars, and none is given"):
        reconstruct_files(run, files, tmp_path / "a.png", column="x")
    reconstruct_files(run, files, tmp_path / "a.png", name="mae", norm_pix=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"--model mae_large: .* is of a model with num_heads"):
        reconstruct_files(run, files, tmp_path / "a.png", name="mae_large")
    reconstruct_files(run, files, tmp_path / "a.png", norm_pix=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("was trained without --norm-pix: the picture will look wrong")


def test_a_folder_of_other_things_gets_no_model(run, tmp_path):
    folder = write_images(tmp_path / "images")[0].parent
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match="holds other things than a model"):
        export_file(run, folder, "hf")
    assert sorted(folder.iterdir()) == before
    for name in ("e.bin", "e.PTH", "e.ckpt"):
        with pytest.raises(ConfigError, match="give a folder, or a file name that ends in"):
            export_file(run, tmp_path / name, "hf")
        assert not (tmp_path / name).exists()


def test_a_folder_of_a_model_may_be_written_again(run, tmp_path):
    (tmp_path / "vit").mkdir()
    for name in (".gitattributes", "README.md"):
        (tmp_path / "vit" / name).touch()
    for format in ("hf", "hf-mae"):
        export_file(run, tmp_path / "vit", format)
    assert open_weights(tmp_path / "vit").has_decoder


def test_reconstruct_takes_what_data_may_be(run, tmp_path, monkeypatch):
    """Of each folder, list, tar or table some images, the same ones wherever they lie."""
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    files = write_images(tmp_path / "images")
    write_shards(tmp_path / "shards")
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files]}), tmp_path / "table.parquet")
    drawn = []
    monkeypatch.setattr(pictures, "save_picture", lambda columns, names, *rest: drawn.append((columns, names)))
    reconstruct_files(run, [files[0], files[3], files[6]], tmp_path / "a.png")
    for given in ("images", "list.txt", "shards", "shards/{0000..0001}.tar", "table.parquet"):
        reconstruct_files(run, [str(tmp_path / given)], tmp_path / "a.png", count=3)
        assert all(map(torch.equal, drawn[-1][0], drawn[0][0])), given
    assert drawn[-1][1] == ["table.parquet[0]", "table.parquet[3]", "table.parquet[6]"]
    with pytest.raises(ConfigError, match=r"^[^-].*none\.tar"):
        reconstruct_files(run, [str(tmp_path / "none.tar")], tmp_path / "b.png")
    with pytest.raises(BadImage, match=r"none\.png"):
        reconstruct_files(run, [tmp_path / "none.png"], tmp_path / "b.png")


def test_output_names_are_checked(run, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.safetensors or \.pth"):
        export_file(run, tmp_path / "encoder.bin", "timm")
