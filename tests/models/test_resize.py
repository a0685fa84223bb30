"""Weights made to fit: tables of another grid, other patches, other channels."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from maefast.models import create, load_checkpoint
from maefast.models.convert import encoder_state
from maefast.models.fit import fit_to_model
from maefast.models.resize import change_channels, resize_patches, resize_positions, sincos_grid
from maefast.nn.positions import sincos_2d
from tests.models.common import encoder_of, inputs, small

GRIDS = [(1, 1), (1, 7), (4, 9), (9, 4), (6, 6), (2, 18), (14, 14), (7, 28)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64])
def test_the_grid_is_read_from_the_table(grid, dtype, width):
    table = sincos_2d(width, grid, 1)[None].to(dtype)
    assert sincos_grid(table) == grid
    assert sincos_grid(table.float()) == grid  # back again: the rounding stays


def test_other_tables_have_no_grid():
    table = sincos_2d(16, (4, 9), 1)[None]
    assert sincos_grid(torch.zeros_like(table)) is None
    assert sincos_grid(table + 0.01) is None
    assert sincos_grid(torch.randn(1, 37, 16)) is None
    assert sincos_grid(torch.randn(1, 37, 15)) is None
    assert sincos_grid(table[:, :1]) is None
    assert sincos_grid(table[0]) is None
    assert sincos_grid(table[:0]) is None
    assert sincos_grid(table.long()) is None


def test_positions_are_interpolated():
    """A table that is linear in row and column stays so inside, and the class token keeps its row."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    table = torch.cat([torch.full((1, 1, 2), 9.0), torch.stack([rows, columns], -1).reshape(1, 48, 2)], 1)
    out = resize_positions(table, (8, 6), (16, 12))
    assert out.shape == (1, 193, 2)
    assert torch.equal(out[:, 0], table[:, 0])
    cells = out[0, 1:].reshape(16, 12, 2)
    want = torch.stack(torch.meshgrid(torch.arange(16) / 2 - 0.25, torch.arange(12) / 2 - 0.25, indexing="ij"), -1)
    torch.testing.assert_close(cells[4:-4, 4:-4], want[4:-4, 4:-4])
    assert resize_positions(table, (8, 6), (8, 6)) is table
    # A transposed grid is another grid, though the number of patches is the same.
    assert not torch.allclose(resize_positions(table, (8, 6), (6, 8)), table, atol=0.1)


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 8)])
def test_enlarged_patches_are_embedded_alike(size):
    """FlexiViT's property: the new embedding of the enlarged patch is the old one of the patch."""
    weight, patch = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    larger = F.interpolate(patch, size=size, mode="bilinear", align_corners=False)
    got = torch.einsum("dchw,bchw->bd", resize_patches(weight, size), larger)
    torch.testing.assert_close(got, torch.einsum("dchw,bchw->bd", weight, patch), rtol=1e-9, atol=1e-9)


def test_smaller_patches_are_the_least_squares_fit():
    """No other weights of this size come closer, over white patches, to what the old ones gave."""
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    best = resize_patches(weight, (4, 4))
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    small = F.interpolate(basis, size=(4, 4), mode="bilinear", align_corners=False, antialias=True)

    def error(new):
        return ((small * new).sum((1, 2, 3)) - (basis * weight).sum((1, 2, 3))).square().sum()

    for _ in range(20):
        assert error(best + 0.01 * torch.randn_like(best)) > error(best)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("old", [1, 3, 4])
def test_images_whose_channels_are_alike_give_the_same(old, channels):
    weight, grey = torch.randn(5, old, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    new = change_channels(weight, channels)
    assert new.shape == (5, channels, 4, 4)
    want = torch.einsum("dchw,bchw->bd", weight, grey.expand(-1, old, -1, -1))
    got = torch.einsum("dchw,bchw->bd", new, grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(got, want)
    assert change_channels(weight, old) is weight


# --- models --------------------------------------------------------------------------------------------------


def file_of(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def load(model, path, **options):
    lines = []
    load_checkpoint(model, path, say=lines.append, **options)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.mark.parametrize(("old", "new"), [((64, 64), (32, 128)), ((32, 128), (64, 64)), ((64, 64), (48, 80))])
def test_fixed_tables_stay_the_model_s_own(tmp_path, old, new):
    """The issue's case: as many patches, another grid."""
    path = file_of(small(torch.float32, img_size=old, patch_size=16), tmp_path)
    model = small(torch.float32, img_size=new, patch_size=16, seed=1)
    lines = load(model, path)
    grid = (new[0] // 16, new[1] // 16)
    assert torch.equal(model.pos_embed, sincos_2d(model.config["embed_dim"], grid, 1)[None])
    assert torch.equal(model.decoder_pos_embed, sincos_2d(model.config["decoder_embed_dim"], grid, 1)[None])
    stays = f"the model's own table of {grid[0]} x {grid[1]} patches stays; the file's is of {old[0] // 16} x "
    assert [line.partition(": ")[0] for line in lines] == ["pos_embed", "decoder_pos_embed"]
    assert all(stays in line for line in lines)
    assert torch.equal(model.norm.weight, torch.load(path)["model"]["norm.weight"])


def test_exact_refuses_another_grid(tmp_path):
    path = file_of(small(torch.float32, img_size=(64, 64), patch_size=16), tmp_path)
    for size in ((32, 128), (96, 96)):
        model = small(torch.float32, img_size=size, patch_size=16, seed=1)
        before = model.norm.weight.clone()
        with pytest.raises(ValueError, match="pos_embed: of 4 x 4 patches in the file, and of"):
            load(model, path, exact=True)
        assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(tmp_path, dtype):
    model = small(torch.float32, seed=1).to(dtype)
    load(model, file_of(small(torch.float32), tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.pos_embed.requires_grad


def test_integers_are_no_weights(tmp_path):
    state = {key: (value * 100).to(torch.int8) for key, value in small(torch.float32).state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"is torch\.int8 in the file"):
        load(small(torch.float32), tmp_path / "weights.pth")


def test_what_does_not_fit_is_named(tmp_path):
    source = small(torch.float32, num_heads=2)
    torch.save({"model": source.state_dict(), "maefast": json.dumps(source.config)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not fit the model: num_heads is 2 in the file and 4"):
        load_checkpoint(small(torch.float32, num_heads=4), tmp_path / "weights.pth")


def test_an_encoder_alone_compares_its_heads():
    source = small(torch.float32, num_heads=2)
    encoder = encoder_of(32, 2, 4)
    with pytest.raises(ValueError, match="num_heads is 2 in the file and 4 in the model"):
        fit_to_model(source.state_dict(), encoder, "encoder", config=source.config)


def test_the_same_grid_says_nothing(tmp_path):
    source = small(torch.float32)
    model = small(torch.float32, seed=1)
    assert load(model, file_of(source, tmp_path)) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


def test_another_fixed_table_of_the_same_grid_is_taken(tmp_path):
    """Weights trained with a table of their own need it: exactness before beauty; but it is told."""
    source = small(torch.float32)
    source.decoder_pos_embed.data.zero_()  # of a fresh ViTMAE in transformers
    model = small(torch.float32, seed=1)
    (line,) = load(model, file_of(source, tmp_path))
    assert line == "decoder_pos_embed: the file's is not sin-cos; it is taken as it is, and stays fixed"
    assert not model.decoder_pos_embed.any()


def test_learned_tables_are_interpolated(tmp_path):
    source = small(torch.float32, img_size=(32, 32), positions="learned")
    path = file_of(source, tmp_path)
    model = small(torch.float32, img_size=(48, 64), positions="learned", seed=1)
    lines = load(model, path)
    assert lines == [
        f"{name}: learned table interpolated from 4 x 4 (taken for a square) to 6 x 8 patches, bicubic"
        for name in ("pos_embed", "decoder_pos_embed")
    ]
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (4, 4), (6, 8)))
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        load(model, path, exact=True)


def test_learned_tables_whose_layout_is_not_told(tmp_path):
    path = file_of(small(torch.float32, img_size=(16, 64), positions="learned"), tmp_path)  # 2 x 8: a square, 4 x 4
    model = small(torch.float32, img_size=(16, 64), positions="learned", seed=1)
    for exact in (False, True):  # into the model that it is of, above all
        lines = load(model, path, exact=exact)
        unsure = "learned positions are taken as they are (the file does not tell how its patches lie)"
        assert lines == [f"pos_embed: {unsure}", f"decoder_pos_embed: {unsure}"]
        assert torch.equal(model.pos_embed, torch.load(path)["model"]["pos_embed"])
    other = small(torch.float32, img_size=(32, 32), positions="learned", seed=1)
    assert len(load(other, path)) == 2  # a square, as guessed, and told
    path = file_of(small(torch.float32, img_size=(16, 40), positions="learned"), tmp_path)
    with pytest.raises(ValueError, match="pos_embed: nothing tells how the 10 patches"):
        load(model, path)
    load(small(torch.float32, img_size=(16, 40), positions="learned", seed=1), path)


def test_the_configuration_of_the_file_tells_the_layout():
    source = small(torch.float32, img_size=(16, 64), positions="learned")
    model = small(torch.float32, img_size=(32, 32), positions="learned", seed=1)
    state, lines = fit_to_model(source.state_dict(), model, config=source.config)
    assert "interpolated from 2 x 8 to 4 x 4" in lines[0]
    assert torch.equal(state["pos_embed"], resize_positions(source.pos_embed, (2, 8), (4, 4)))
    same = small(torch.float32, img_size=(16, 64), positions="learned", seed=1)
    state, lines = fit_to_model(source.state_dict(), same, config=source.config)
    assert lines == []
    assert torch.equal(state["pos_embed"], source.pos_embed)


def test_what_no_shape_shows():
    source = small(torch.float32, num_heads=2, norm_pix_loss=True, norm_eps=1e-5)
    with pytest.raises(ValueError, match="num_heads is 2 in the file and 4 in the model"):
        fit_to_model(source.state_dict(), small(torch.float32, num_heads=4), config=source.config)
    _, lines = fit_to_model(source.state_dict(), small(torch.float32, norm_eps=1e-6), config=source.config)
    assert lines == [
        "norm_eps is 1e-06 in the model, and was 1e-05 in the file's",
        "norm_pix_loss is False in the model, and was True in the file's",
    ]


def test_the_classifier_of_a_published_encoder_is_left_out(tmp_path):
    """timm's files have one, and learned positions; DeiT's second token is refused by its name."""
    source = small(torch.float32, positions="learned")
    state = encoder_state(source.state_dict()) | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "weights.pth")
    model = small(torch.float32, positions="learned", seed=1)
    assert len(load(model, tmp_path / "weights.pth", part="encoder")) == 1  # the positions
    images, _ = inputs(model)
    assert torch.equal(model.encode(images), source.encode(images))
    state |= {"dist_token": torch.zeros(1, 1, 32), "pos_embed": torch.zeros(1, 18, 32)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="dist_token"):
        load(model, tmp_path / "weights.pth", part="encoder")


def test_a_frozen_learned_table_is_still_learned(tmp_path):
    model = small(torch.float32, positions="learned", seed=1).requires_grad_(False)
    source = small(torch.float32, positions="learned")
    load(model, file_of(source, tmp_path))
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_other_patches_and_channels(tmp_path):
    source = small(torch.float32)  # patches of 8, three channels
    model = small(torch.float32, img_size=64, patch_size=16, in_chans=1, seed=1)
    fresh = model.decoder_pred.weight.clone()
    lines = load(model, file_of(source, tmp_path))
    want = resize_patches(change_channels(source.patch_embed.proj.weight, 1), (16, 16))
    assert torch.equal(model.patch_embed.proj.weight, want)
    assert torch.equal(model.decoder_pred.weight, fresh)
    assert torch.equal(model.decoder_norm.weight, source.decoder_norm.weight)
    assert lines == [
        "patch_embed.proj.weight: 3 channels to 1, summed",
        "patch_embed.proj.weight: patches of 8 x 8 to 16 x 16 pixels, by the pseudo-inverse (FlexiViT)",
        "decoder_pred starts fresh: it predicts 256 values, the file's 192",
    ]
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(small(torch.float32, img_size=64, patch_size=16), file_of(source, tmp_path), exact=True)


@pytest.mark.parametrize("name", ["spark_resnet50", "fcmae_convnextv2_atto"])
def test_channels_of_convnets(tmp_path, name):
    source, model = create(name, img_size=64), create(name, img_size=64, in_chans=5)
    lines = load(model, file_of(source, tmp_path))
    assert len(lines) == 2
    assert "3 channels to 5, repeated, each divided by how often" in lines[0]
    assert "starts fresh" in lines[1]


def test_what_cannot_be_made_to_fit_is_refused(tmp_path):
    path = file_of(small(torch.float32), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for cls_token"):
        load(small(torch.float32, embed_dim=64), path)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.2"):
        load(small(torch.float32, depth=3), path)
