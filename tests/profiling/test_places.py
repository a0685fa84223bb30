"""Which stage a call belongs to: paths and classes of modules, functions, ops."""

from __future__ import annotations

import pytest
from torch import nn

from maefast import models
from maefast.profiling.attribution import account
from maefast.profiling.calls import FREE, OP, PYTHON, Call
from maefast.profiling.places import KINDS, Place, Places, order, parts_of_block

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1,
        "decoder_num_heads": 2, "img_size": 16, "patch_size": 4}  # fmt: skip
MAE = models.create("mae", **TINY)
BLOCK = "maefast/ops/_transformer_block.py"


def stage(model, *calls):
    places, place = Places(model), Place()
    for call in calls:
        place = places.inside(place, call)
    return place.stage


def module(m):
    return Call(PYTHON, type(m).__name__, 0, 1, module=id(m), file="torch/nn/modules/module.py")


def function(file, name):
    return Call(PYTHON, name, 0, 1, file=file, function=name)


def op(name):
    return Call(OP, name, 0, 1)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("patch_embed", "embed"),
        ("patch_embed.proj", "embed"),
        ("blocks.0", "encoder other"),
        ("blocks.0.attn", "encoder attention"),
        ("blocks.0.mlp", "encoder MLP"),
        ("blocks.0.norm1", "encoder norms"),
        ("norm", "encoder norms"),
        ("decoder_embed", "decoder linear"),
        ("decoder_blocks.0.attn", "decoder attention"),
        ("decoder_norm", "decoder norms"),
        ("decoder_pred", "decoder linear"),
    ],
)
def test_parts_of_a_masked_autoencoder(path, wanted):
    assert stage(MAE, module(MAE), module(MAE.get_submodule(path))) == wanted


def test_layers_inside_attention_and_mlp_belong_to_them():
    block = MAE.blocks[0]
    assert stage(MAE, module(block.attn), module(block.attn.qkv), op("aten::addmm")) == "encoder attention"
    assert stage(MAE, module(block.mlp), module(block.mlp.fc1), op("aten::gelu")) == "encoder MLP"


def test_parts_of_any_module():
    parts = nn.ModuleList(
        [nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MultiheadAttention(1, 1), nn.GELU(), nn.MSELoss(),
         nn.Dropout()]
    )  # fmt: skip
    found = [stage(parts, module(part)) for part in parts]
    assert found == ["linear", "conv", "norms", "attention", "activation", "loss", "other"]
    assert stage(parts, op("aten::native_layer_norm")) == "norms"
    assert stage(parts, op("aten::_scaled_dot_product_flash_attention_for_cpu")) == "attention"
    assert stage(parts, op("aten::mkldnn_convolution")) == "conv"
    assert stage(parts, op("aten::addmm")) == "linear"
    assert stage(parts, op("aten::mse_loss_backward")) == "loss"
    assert stage(parts, op("aten::add")) == "other"


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        ([("maefast/masking/uniform.py", "random")], "mask"),
        ([("/home/me/src/maefast/ops/mask.py", "token_mask")], "mask"),
        ([("maefast/nn/encoder.py", "run_encoder"), ("maefast/ops/embed.py", "patch_embed")], "embed"),
        ([("maefast/nn/decoder.py", "run_decoder"), ("maefast/ops/restore.py", "restore_tokens")], "restore"),
        ([("maefast/ops/loss.py", "patch_loss"), ("maefast/ops/mask.py", "mask")], "loss"),
        ([("maefast/recipe.py", "prepared"), ("maefast/ops/points.py", "knn")], "prepare"),
        ([("maefast/recipe.py", "prepared"), ("maefast/masking/uniform.py", "random")], "mask"),
        ([("maefast/recipe.py", "prepared"), ("maefast/nn/teachers.py", "__call__")], "teacher"),
        ([("maefast/recipe.py", "to")], "host to device"),
        ([("maefast/integrations/mae.py", "encode")], "encoder other"),
        ([("maefast/integrations/hf_vitmae.py", "decoder_forward")], "decoder other"),
        ([("maefast/integrations/mae.py", "score")], "loss"),
        ([("models_mae.py", "forward_encoder"), ("models_mae.py", "random_masking")], "mask"),
        ([("models_mae.py", "forward_loss")], "loss"),
        ([("torch/nn/functional.py", "cross_entropy")], "loss"),
        ([("torch/nn/functional.py", "linear")], "other"),
        ([("torch/optim/adamw.py", "step")], "optimizer"),
        ([("torch/nn/utils/clip_grad.py", "clip_grad_norm_")], "optimizer"),
        ([("user.py", "prepared")], "other"),
    ],
)
def test_functions(calls, wanted):
    assert stage(MAE, *(function(*call) for call in calls)) == wanted


def test_the_fused_block_is_taken_apart_by_its_norms():
    names = ["maefast::add_norm", "aten::addmm", "maefast::attention", "aten::addmm", "maefast::add_norm",
             "aten::addmm", "maefast::bias_gelu", "aten::addmm"]  # fmt: skip
    call = function(BLOCK, "_forward")
    call.calls = [op(name) for name in names]
    found = [place.stage for place in parts_of_block(call, Place("encoder"))]
    attention, mlp = ["encoder attention"] * 3, ["encoder MLP"] * 3
    assert found == ["encoder norms", *attention, "encoder norms", *mlp]
    assert parts_of_block(function("user.py", "_forward"), Place("encoder")) is None


def test_the_fused_blocks_backward():
    backward = function(BLOCK, "_gradients")
    place = Places(MAE).inside(Place("decoder"), backward)
    assert place.stage == "decoder attention"
    mlp = Places(MAE).inside(place, function(BLOCK, "_through_mlp"))
    assert mlp.stage == "decoder MLP"
    assert Places(MAE).inside(mlp, op("maefast::add_norm_backward")).stage == "decoder norms"


def test_every_stage_has_its_row():
    names = order()
    assert len(names) == len(set(names))
    for area in ("data", "prepare", "teacher", "mask", "embed", "restore", "loss", "autograd", "optimizer"):
        assert Place(area).stage in names
    for area in ("encoder", "decoder", ""):
        for kind in (*KINDS, ""):
            assert Place(area, kind).stage in names


@pytest.mark.parametrize("area", ["teacher", "loss", "optimizer", "mask", "restore", "host to device"])
def test_nothing_begins_inside(area):
    assert Place(area).enter("encoder") == Place(area)
    assert Place(area).turn("norms") == Place(area)


def test_what_runs_behind_the_decoder_is_the_loss():
    def at(name, start, m=None):
        return Call(PYTHON, name, start, start + 1, "user.py", name, None if m is None else id(m))

    back = Call(PYTHON, "backward", 4, 5, "torch/_tensor.py", "backward")
    inside = [at("before", 1), at("Linear", 2, MAE.decoder_pred), at("my_own_distance", 3), back, at("after", 6)]
    step = Call(PYTHON, "step", 0, 10, "user.py", "step", calls=inside)
    found = account([step], Places(MAE), FREE).stages
    assert found["loss"].python == 1
    assert found["decoder linear"].python == 1
    assert found["other"].python == 10 - 5 + 2
