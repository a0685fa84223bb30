"""Published checkpoints: names and shapes of the original MAE, its files, and round trips."""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from maefast import models
from maefast.models import create, list_models, load_checkpoint, read_state_dict
from maefast.models.convert import encoder_state
from tests.models.common import encoder_of, inputs, small


def original_layout(width, depth, decoder_width, decoder_depth, patch, tokens) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of facebookresearch/mae, written out from its documentation."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        "mask_token": (1, 1, decoder_width),
        "decoder_pos_embed": (1, tokens + 1, decoder_width),
        "decoder_norm.weight": (decoder_width,),
        "decoder_norm.bias": (decoder_width,),
        "decoder_pred.weight": (patch * patch * 3, decoder_width),
        "decoder_pred.bias": (patch * patch * 3,),
    }
    for name, d, count in (("blocks", width, depth), ("decoder_blocks", decoder_width, decoder_depth)):
        for i in range(count):
            for part, out, into in (
                ("attn.qkv", 3 * d, d),
                ("attn.proj", d, d),
                ("mlp.fc1", 4 * d, d),
                ("mlp.fc2", d, 4 * d),
            ):
                shapes[f"{name}.{i}.{part}.weight"] = (out, into)
                shapes[f"{name}.{i}.{part}.bias"] = (out,)
            for part in ("norm1", "norm2"):
                shapes[f"{name}.{i}.{part}.weight"] = shapes[f"{name}.{i}.{part}.bias"] = (d,)
    return shapes


ORIGINALS = {
    "mae_base": (768, 12, 512, 8, 16, 196),
    "mae_large": (1024, 24, 512, 8, 16, 196),
    "mae_huge": (1280, 32, 512, 8, 14, 256),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_names_and_shapes_are_the_original_s(name):
    with torch.device("meta"):
        model = create(name)
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert got == original_layout(*ORIGINALS[name])
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == ["pos_embed", "decoder_pos_embed"]
    heads = {"mae_base": 12, "mae_large": 16, "mae_huge": 16}[name]
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {16}
    assert model.num_patches == ORIGINALS[name][-1]


def test_vit_b_checkpoint_loads_strictly():
    """All 252 tensors of a ViT-B file arrive where they belong."""
    shapes = original_layout(*ORIGINALS["mae_base"])
    assert len(shapes) == 14 + 12 * 20
    state = {key: torch.full((1,), float(i)).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    with torch.device("meta"):
        model = create("mae_base")
    model.load_state_dict(state, strict=True, assign=True)
    for i, key in enumerate(shapes):
        assert model.get_parameter(key).flatten()[0].item() == i
    del state["decoder_blocks.7.mlp.fc2.bias"]
    with pytest.raises(RuntimeError, match=r"decoder_blocks\.7\.mlp\.fc2\.bias"):
        model.load_state_dict(state, strict=True)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "bare", "ddp", "training", "safetensors"])
def test_files(wrap, tmp_path):
    source, target = small(torch.float32), small(torch.float32, seed=1)
    assert not same(source, target)
    state, path = source.state_dict(), tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif wrap == "training":  # as the original's main_pretrain writes them
        args = argparse.Namespace(model="mae_vit_base_patch16", lr=1.5e-4)
        torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}, path)
    elif wrap == "ddp":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state if wrap == "bare" else {wrap: state}, path)
    assert load_checkpoint(target, path) is target
    assert same(source, target)


def test_encoder_files(tmp_path):
    """The original publishes encoders alone; they go into a model's encoder or into `maefast.nn.Encoder`."""
    source, target = small(torch.float32), small(torch.float32, seed=1)
    torch.save({"model": encoder_state(source.state_dict())}, tmp_path / "encoder.pth")
    torch.save({"model": source.state_dict()}, tmp_path / "all.pth")
    with pytest.raises(RuntimeError, match="decoder_embed"):
        load_checkpoint(target, tmp_path / "encoder.pth")
    decoder = {k: v.clone() for k, v in target.state_dict().items() if k not in encoder_state(target.state_dict())}
    for file in ("encoder.pth", "all.pth"):
        fresh = copy.deepcopy(target)
        load_checkpoint(fresh, tmp_path / file, part="encoder")
        images, _ = inputs(source)
        assert torch.equal(fresh.encode(images), source.encode(images))
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in decoder.items())
    encoder = encoder_of(32, 2, 2)
    load_checkpoint(encoder, tmp_path / "all.pth", part="encoder")
    assert torch.equal(encoder(images), source.encode(images))
    source.num_heads = None
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(small(torch.float32, embed_dim=64), tmp_path / "all.pth")


class Malicious:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "none.pth")
    torch.save({"model": 3}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"(?s)no weights of a known model\. In it: \"model\" \(int\)\nTried: "):
        read_state_dict(tmp_path / "odd.pth")
    torch.save({"model": Malicious()}, tmp_path / "code.pth")
    with pytest.raises(pickle.UnpicklingError):
        read_state_dict(tmp_path / "code.pth")


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("mae")])
def test_config_is_json_and_rebuilds(name):
    with torch.device("meta"):
        model = create(name, img_size=(64, 96), patch_size=16, in_chans=2, norm_pix_loss=True, decoder_depth=1, depth=2)
        config = json.loads(json.dumps(model.config))
        again = models.create(**config)
    assert again.config == model.config
    assert config["name"] == name
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]
    assert model.num_patches == 24
    assert (model.in_chans, model.norm_pix_loss, len(model.decoder_blocks)) == (2, True, 1)


def test_deepcopy_pickle_and_state_dict():
    model = small(norm_pix_loss=True)
    images, noise = inputs(model)
    loss, pred, _ = model(images, 0.75, noise)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    reloaded = small(norm_pix_loss=True, seed=3)
    reloaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded):
        assert torch.equal(other(images, 0.75, noise)[0], loss)
        assert torch.equal(other(images, 0.75, noise)[1], pred)
    other = copy.deepcopy(model)
    other.mask_token.data.zero_()
    assert model.mask_token.abs().sum() > 0
