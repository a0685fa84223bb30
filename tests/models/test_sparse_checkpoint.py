"""Weights of masked convnets: the authors' files, encoders alone, sparse kernels, timm's names, and the ways back."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from maefast.models import FCMAE, SparK, load_checkpoint, read_state_dict
from maefast.models.convert import encoder_prefix, encoder_state
from maefast.models.convnames import convnext_to_timm, family, fcmae_to_sparse, sparse_to_fcmae, timm_to_convnext
from maefast.models.convnext import ConvNeXt
from maefast.models.resnet import ResNet
from tests.models.common import small

WIDTHS, KINDS = (8, 12, 16, 24), ["resnet", "convnext", "fcmae"]


def make(kind, seed=0, size=64):
    """No two weights of it are alike."""
    torch.manual_seed(seed)
    if kind == "fcmae":
        model = FCMAE(size, 3, (1, 2, 1, 1), WIDTHS, decoder_embed_dim=8)
    elif kind == "resnet":
        model = SparK(ResNet((1, 2, 1, 1), width=8), size, decoder_width=32)
    else:
        model = SparK(ConvNeXt((1, 2, 1, 1), WIDTHS, grn_scope=None), size, decoder_width=32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor))
    return model.eval()


def net(model):
    return model.encoder if isinstance(model, FCMAE) else model.sparse_encoder.sp_cnn


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].shape == want[key].shape, key
        assert torch.equal(got[key], want[key]), key


def assert_same_encoder(a, b):
    assert_same(net(a).state_dict(), net(b).state_dict())


def decoder(model):
    prefix = encoder_prefix(model.state_dict())
    assert prefix
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(prefix)}


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_spark_files(kind, tmp_path):
    """As SparK's code writes them: {args, ..., module: {..., config}}, at another image size."""
    source, target = make(kind), make(kind, seed=1, size=96)
    config = {"mask_ratio": 0.6, "densify_norm_str": "bn", "sbn": True, "sparse_encoder.input_size": 64}
    document = {
        "args": "{'model': 'resnet50'}", "input_size": 64, "arch": "resnet50", "epoch": 3, "performance_desc": "",
        "module": {**source.state_dict(), "config": config}, "optimizer": {"state": {}}, "is_pretrain": True,
    }  # fmt: skip
    torch.save(document, tmp_path / "spark.pth")
    assert_same(read_state_dict(tmp_path / "spark.pth"), source.state_dict())
    assert load_checkpoint(target, tmp_path / "spark.pth") is target
    assert target.norm_black.shape[2:] == (96, 96)  # nothing reads it
    unused = ("imn_m", "imn_s", "norm_black")
    drop = lambda model: {k: v for k, v in model.state_dict().items() if k not in unused}  # noqa: E731
    assert_same(drop(target), drop(source))
    again = make(kind, seed=2)
    state = {key: value for key, value in source.state_dict().items() if key not in unused}
    torch.save(state, tmp_path / "without.pth")
    load_checkpoint(again, tmp_path / "without.pth")
    assert_same(drop(again), drop(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["whole", "bare", "prefixed", "timm", "safetensors"])
def test_encoder_alone(kind, file, tmp_path):
    source, target = make(kind), make(kind, seed=1)
    state, path = net(source).state_dict(), tmp_path / "encoder.pth"
    prefix = encoder_prefix(source.state_dict())
    if file == "whole":
        torch.save({"model": source.state_dict()}, path)
    elif file == "prefixed":
        torch.save({prefix + key: value for key, value in state.items()}, path)
    elif file == "timm" and kind != "resnet":
        torch.save(convnext_to_timm(state), path)
    elif file == "safetensors":
        save_file(state, path := tmp_path / "encoder.safetensors")
    else:
        torch.save(state, path)
    before = decoder(target)
    load_checkpoint(target, path, part="encoder")
    assert_same_encoder(target, source)
    assert_same(decoder(target), before)
    if file != "whole":
        with pytest.raises(RuntimeError, match="Missing key"):
            load_checkpoint(target, path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_keeps_its_head(kind, tmp_path):
    """Fine-tuning: the pre-trained encoder goes into a plain convnet; a fine-tuned one back into the encoder."""
    source = make(kind)
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    torch.manual_seed(3)
    if kind == "resnet":
        plain = ResNet((1, 2, 1, 1), width=8, num_classes=5)
    else:
        plain = ConvNeXt((1, 2, 1, 1), WIDTHS, grn_scope="sample" if kind == "fcmae" else None, num_classes=5)
    head = plain.fc if kind == "resnet" else plain.head
    before = head.weight.clone()
    load_checkpoint(plain, tmp_path / "whole.pth", part="encoder")
    assert torch.equal(head.weight, before)
    images = torch.randn(2, 3, 64, 64)
    for a, b in zip(plain.eval()(images, hierarchical=True), net(source)(images, hierarchical=True)):
        torch.testing.assert_close(a, b)
    torch.save(plain.state_dict(), tmp_path / "tuned.pth")
    target = make(kind, seed=1)
    load_checkpoint(target, tmp_path / "tuned.pth", part="encoder")
    assert_same_encoder(target, source)


def sparse_by_hand(model):
    """What the public pre-training code of FCMAE holds, element by element."""

    def kernel(weight):
        cout, cin, rows, columns = weight.shape
        out = torch.empty(rows * columns, cin, cout)
        for row in range(rows):
            for column in range(columns):
                out[column * rows + row] = weight[:, :, row, column].T
        return out

    state, out = model.state_dict(), {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] != "encoder" or key.startswith("encoder.downsample_layers.0."):
            out[key] = value
        elif parts[1] == "downsample_layers" and parts[3] == "0":
            out[key.replace(".0.weight", ".0.ln.weight").replace(".0.bias", ".0.ln.bias")] = value
        elif parts[1] == "downsample_layers":
            new = key.replace(".1.weight", ".1.kernel")
            out[new] = kernel(value) if parts[-1] == "weight" else value.reshape(1, -1)
        elif parts[4] == "dwconv":
            new = key.replace("dwconv.weight", "dwconv.kernel")
            out[new] = kernel(value).reshape(49, -1) if parts[-1] == "weight" else value.reshape(1, -1)
        elif parts[4] == "norm":
            out[key.replace(".norm.", ".norm.ln.")] = value
        elif parts[4] == "grn":
            out[key] = value.reshape(1, -1)
        else:
            out[key.replace("pwconv1.", "pwconv1.linear.").replace("pwconv2.", "pwconv2.linear.")] = value
    return out


def test_sparse_kernels_of_fcmae(tmp_path):
    source, target = make("fcmae"), make("fcmae", seed=1)
    sparse = sparse_by_hand(source)
    assert sparse["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 12)
    assert sparse["encoder.stages.1.0.dwconv.kernel"].shape == (49, 12)
    assert sparse["encoder.stages.1.1.grn.gamma"].shape == (1, 48)
    assert sparse["decoder.0.grn.gamma"].shape == (1, 1, 1, 32)
    assert_same(fcmae_to_sparse(source.state_dict()), sparse)
    assert_same(sparse_to_fcmae(sparse), source.state_dict())
    assert_same(fcmae_to_sparse(sparse_to_fcmae(sparse)), sparse)
    torch.save({"model": sparse, "epoch": 1, "args": argparse.Namespace(blr=1)}, tmp_path / "public.pt")
    load_checkpoint(target, tmp_path / "public.pt")
    assert_same(target.state_dict(), source.state_dict())
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    assert torch.equal(target(images, noise=noise)[0], source(images, noise=noise)[0])
    # The same without the prefix, whole and the encoder alone.
    bare = {key.removeprefix("encoder."): value for key, value in sparse.items()}
    torch.save({"model": bare}, tmp_path / "bare.pt")
    load_checkpoint(again := make("fcmae", seed=2), tmp_path / "bare.pt")
    assert_same(again.state_dict(), source.state_dict())
    encoder = {k: v for k, v in bare.items() if k.startswith(("stages.", "downsample_layers."))}
    torch.save(encoder, tmp_path / "encoder.pt")
    load_checkpoint(target := make("fcmae", seed=1), tmp_path / "encoder.pt", part="encoder")
    assert_same_encoder(target, source)


def test_a_kernel_that_is_not_square_is_refused():
    state = {"stages.0.0.dwconv.kernel": torch.zeros(48, 8)}
    with pytest.raises(ValueError, match=r"'stages\.0\.0\.dwconv\.kernel' is no square kernel: its shape is \(48, 8\)"):
        sparse_to_fcmae(state)


@pytest.mark.parametrize("kind", ["convnext", "fcmae"])
def test_timm_names_of_convnext(kind):
    state = net(make(kind)).state_dict()
    state.update({"norm.weight": torch.ones(24), "head.weight": torch.zeros(5, 24)})
    theirs = convnext_to_timm(state)
    for key in (
        "stem.0.weight", "stem.1.bias", "stages.1.downsample.0.weight", "stages.3.downsample.1.bias", "head.fc.weight",
        "stages.1.blocks.1.conv_dw.weight", "stages.0.blocks.0.norm.bias", "stages.2.blocks.0.mlp.fc2.weight",
        "head.norm.weight",
    ):  # fmt: skip
        assert key in theirs
    if kind == "fcmae":
        assert theirs["stages.0.blocks.0.mlp.grn.weight"].shape == (32,)
        assert torch.equal(theirs["stages.0.blocks.0.mlp.grn.bias"], state["stages.0.0.grn.beta"].flatten())
    else:
        assert "stages.0.blocks.0.gamma" in theirs
    assert not [key for key in theirs if "pwconv" in key or "downsample_layers" in key]
    assert_same(timm_to_convnext(theirs), state)
    theirs["stages.0.blocks.0.mlp.fc1.weight"] = theirs["stages.0.blocks.0.mlp.fc1.weight"][..., None, None]
    assert_same(timm_to_convnext(theirs), state)


def test_families():
    assert family(small().state_dict()) == family(encoder_state(small().state_dict())) == "mae"
    for kind in KINDS:
        state = make(kind).state_dict()
        want = "fcmae" if kind == "fcmae" else "spark"
        assert family(state) == family(encoder_state(state)) == want
    assert family({"conv1.weight": torch.zeros(1)}) is None


def test_another_net_is_refused(tmp_path):
    torch.save(net(make("convnext")).state_dict(), tmp_path / "v1.pth")
    with pytest.raises(RuntimeError, match=r"encoder\.stages\.0\.0\.grn\.gamma"):
        load_checkpoint(make("fcmae"), tmp_path / "v1.pth", part="encoder")
