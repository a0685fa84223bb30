"""SparK and FCMAE against dense networks multiplied by the mask, and what users do with them."""

from __future__ import annotations

import pytest
import torch

import maefast
from maefast import models
from maefast.bench.peers import plain_sparse
from maefast.models.convnext import ConvNeXt
from maefast.models.fcmae import FCMAE
from maefast.models.resnet import ResNet
from maefast.models.spark import SparK

SIZE, GRID = 96, 9


def make(kind: str, **changes):
    """A small model; weights away from their special initial values."""
    torch.manual_seed(0)
    if kind.startswith("fcmae"):
        scope = kind.partition("-")[2] or "sample"
        model = FCMAE(SIZE, 3, (1, 1, 2, 1), (8, 16, 24, 32), decoder_embed_dim=16, grn_scope=scope, **changes)
    elif kind == "resnet":
        model = SparK(ResNet((1, 1, 2, 1), width=8), SIZE, decoder_width=64, **changes)
    else:
        model = SparK(ConvNeXt((1, 1, 2, 1), (8, 16, 24, 64), grn_scope=None), SIZE, decoder_width=64, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def data(batch: int = 3, seed: int = 1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.rand(batch, GRID, generator=generator, dtype=torch.float64)


KINDS = ["resnet", "convnext", "fcmae-sample", "fcmae-batch"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense_times_mask_in_float64(kind, backend):
    """Loss, predictions, every gradient and the running statistics of a whole step under a replayed mask."""
    model = make(kind)
    plain = plain_sparse.build(model).double()
    model.double()
    images, noise = data(dtype=torch.float64)
    with maefast.backend(backend):
        loss, pred, mask = model(images, 0.6, noise=noise, pred="full")
        loss.backward()
    wanted, wanted_pred = plain(images, 0.6, noise)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(pred, wanted_pred, rtol=1e-10, atol=1e-10)
    twin = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        want = twin[name].grad
        error = (parameter.grad - want).norm() / want.norm().clamp(min=1e-12)
        assert error < 1e-10, f"{name}: {float(error):.1e}"
    buffers = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-12, msg=name)
    keep = 3 if kind.startswith("fcmae") else 4  # int(9 * 0.4), round(9 * 0.4)
    assert mask.sum(1).tolist() == [GRID - keep] * len(images)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_bfloat16_stay_near(kind):
    model = make(kind)
    exact = make(kind).double()
    images, noise = data()
    with torch.autocast("cpu", torch.bfloat16):
        low, *_ = model(images, noise=noise)
    plain, *_ = make(kind)(images, noise=noise)
    want, *_ = exact(images.double(), noise=noise)
    assert low.dtype is torch.float32
    torch.testing.assert_close(plain.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(low.double(), want, rtol=2e-2, atol=0)
    low.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pixels_do_not_leak(kind):
    """What stands under the mask changes no bit of the encoder's output."""
    model = make(kind).eval()
    images, noise = data()
    plan = model.plan(images, 0.6, noise)
    cells = maefast.ops.CellMask(plan, model.grid_size)
    keep = cells.upsampled_mask(images.shape[2:])
    other = torch.where(keep, images, torch.randn_like(images))
    encoder = model.encoder if isinstance(model, FCMAE) else model.sparse_encoder.sp_cnn
    with torch.no_grad():
        first, second = (encoder(maefast.Cells.pack(x, cells), hierarchical=True) for x in (images, other))
    for a, b in zip(first, second):
        assert torch.equal(a.rows, b.rows)


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_all_visible_is_the_dense_network(kind):
    encoder = make(kind).double().sparse_encoder.sp_cnn.train()
    images, _ = data(dtype=torch.float64)
    dense = encoder(images, hierarchical=True)
    plan = maefast.ops.CellMask.all_visible(len(images), (3, 3))
    for a, b in zip(encoder(maefast.Cells.pack(images, plan), hierarchical=True), dense):
        torch.testing.assert_close(a.dense(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_agree_bit_for_bit(kind):
    images, noise = data()
    grads = []
    for _ in range(2):
        model = make(kind)
        loss, *_ = model(images, noise=noise)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("kind", ["resnet", "convnext", "fcmae"])
def test_compiles_whole(kind):
    """One graph from images to loss, `Cells` and what waits in them included."""
    images, noise = data()
    results = []
    for compiled in (False, True):
        model = make(kind)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss, *_ = call(images, noise=noise)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_ragged_ratios_and_given_masks():
    model = make("fcmae").eval()
    images, noise = data()
    loss, pred, mask = model(images, [0.3, 0.6, 0.9], noise=noise)
    assert mask.sum(1).tolist() == [GRID - 6, GRID - 3, GRID]  # int(9 * (1 - 0.9)) is 0: nothing visible
    assert pred.shape == (int(mask.sum()), 32 * 32 * 3)
    again, *_ = model(images, mask=mask.bool())
    torch.testing.assert_close(again, loss)


def test_spark_keeps_the_published_counts():
    model = SparK(ResNet((1, 1, 1, 1), width=8), 224, decoder_width=32)
    images = torch.zeros(1, 3, 224, 224)
    assert model.plan(images, 0.6).keep == 20  # round(49 * 0.4)
    assert FCMAE(224, 3, (1, 1, 1, 1), (8, 8, 8, 8), decoder_embed_dim=8).plan(images, 0.6).keep == 19  # int


@pytest.mark.parametrize("name", ["spark_resnet50", "spark_convnext_tiny", "fcmae_convnextv2_atto"])
def test_create_and_config(name):
    model = models.create(name, img_size=64)
    again = models.create(**model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.config == model.config
    assert name in models.list_models()


def test_names_of_the_public_spark_checkpoint():
    keys = models.create("spark_resnet50", img_size=32).state_dict().keys()
    for key in (
        "sparse_encoder.sp_cnn.conv1.weight",
        "sparse_encoder.sp_cnn.bn1.running_var",
        "sparse_encoder.sp_cnn.layer1.0.downsample.1.weight",
        "sparse_encoder.sp_cnn.layer4.2.bn3.num_batches_tracked",
        "dense_decoder.dec.0.up_sample.bias",
        "dense_decoder.dec.4.conv.4.running_mean",
        "dense_decoder.proj.weight",
        "densify_norms.3.weight",
        "densify_projs.0.bias",
        "mask_tokens.0",
        "imn_m",
        "norm_black",
    ):
        assert key in keys
    small = models.create("spark_convnext_small", img_size=32, decoder_width=768)
    assert "densify_projs.0.weight" not in small.state_dict()  # 768 = 768: the identity
    assert "sparse_encoder.sp_cnn.stages.2.26.gamma" in small.state_dict()


@pytest.mark.parametrize("kind", ["resnet", "fcmae"])
def test_reconstruct_and_encode(kind):
    model = make(kind).eval()
    images, noise = data()
    result = model.reconstruct(images, 0.6, noise)
    assert result.pasted.shape == images.shape
    assert torch.equal(result.pasted[~result.mask], images[~result.mask])
    features = model.encode(images)
    features = features[-1] if isinstance(features, list) else features
    assert features.shape[2:] == (3, 3)


@pytest.mark.parametrize("kind", ["resnet", "convnext", "fcmae"])
def test_it_learns(kind):
    torch.manual_seed(0)
    model = make(kind)
    _, noise = data()
    wave = torch.linspace(0, 12, SIZE).sin()
    images = (wave[:, None] + wave).expand(3, 3, SIZE, SIZE).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, *_ = model(images, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_bad_sizes():
    with pytest.raises(ValueError, match="no multiple of the encoder's downsampling, 32"):
        SparK(ResNet((1, 1, 1, 1), width=8), 100)
    with pytest.raises(ValueError, match="no multiple of 32"):
        FCMAE(100)
    with pytest.raises(ValueError, match="divides its width"):
        SparK(ResNet((1, 1, 1, 1), width=8), 64, decoder_width=48)
    model = make("fcmae")
    with pytest.raises(ValueError, match="takes images"):
        model(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="removes no cell"):
        model(torch.zeros(2, 3, SIZE, SIZE), 0.0)
    with pytest.raises(ValueError, match="encoder must be one of"):
        models.create("spark_resnet50", encoder="vgg16")
