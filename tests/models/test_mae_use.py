"""Features, pictures, dtypes, autocast, compilation, recomputation and data-parallel training."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import nn

from maefast import models
from tests.models.common import encoder_of, gradients, inputs, largest_error, plain_twin, small


def test_encode_is_the_unmasked_encoder():
    model = small()
    images, noise = inputs(model)
    features = model.encode(images)
    assert features.shape == (3, 17, 32)
    twin = plain_twin(model)
    x = twin.patch_embed(images) + twin.pos_embed[:, 1:]
    x = torch.cat([(twin.cls_token + twin.pos_embed[:, :1]).expand(3, -1, -1), x], 1)
    for block in twin.blocks:
        x = block(x)
    torch.testing.assert_close(features, twin.norm(x), rtol=0, atol=1e-12)
    state = torch.get_rng_state()
    assert torch.equal(model.eval().encode(images), features)  # draws nothing, masks nothing in either mode
    assert torch.equal(state, torch.get_rng_state())
    features.sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None
    # Keeping everything is the same computation with the patches in noise order.
    plan = model.plan(images, 0.0, noise)
    masked = model.encode_visible(images, plan)[:, 1:]
    want = features[:, 1:].gather(1, plan.ids_keep[..., None].expand_as(masked))
    torch.testing.assert_close(masked, want, rtol=0, atol=1e-12)


def test_encoder_alone_has_the_same_parameters():
    model = small(torch.float32)
    encoder = encoder_of(32, 2, 2)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}, strict=True)
    images, _ = inputs(model)
    assert torch.equal(encoder(images), model.encode(images))


def blocks_of(images: torch.Tensor, rows: int, columns: int, ph: int, pw: int):
    """(token, [C, ph, pw] of the batch) by plain slicing."""
    for n in range(rows * columns):
        i, j = divmod(n, columns)
        yield n, images[:, :, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct(norm_pix):
    model = small(norm_pix_loss=norm_pix, img_size=(16, 36), patch_size=(8, 12), in_chans=2)
    images, noise = inputs(model)
    images = images * 40 + 120  # any scale
    result = model.reconstruct(images, 0.5, noise)
    _, pred, mask = model(images, 0.5, noise, pred="full")
    parts = (result.original, result.masked, result.reconstruction, result.pasted, result.mask)
    assert all(part.shape == images.shape for part in parts)
    assert torch.equal(result.original, images)
    assert result.mask.dtype is torch.bool
    grid = (2, 3, 8, 12)
    for n, want in blocks_of(images, *grid):
        picture = pred[:, n].view(3, 8, 12, 2).permute(0, 3, 1, 2)  # a row of pred is (ph, pw, C)
        if norm_pix:
            spread = (want.flatten(1).var(1) + 1e-6).sqrt()
            picture = picture * spread[:, None, None, None] + want.flatten(1).mean(1)[:, None, None, None]
        removed = mask[:, n].bool()
        got = {name: dict(blocks_of(getattr(result, name), *grid))[n] for name in result._fields}
        torch.testing.assert_close(got["reconstruction"], picture, rtol=1e-12, atol=1e-9)
        assert torch.equal(got["mask"], removed[:, None, None, None].expand_as(want))
        assert torch.equal(got["masked"][~removed], want[~removed])
        assert (got["masked"][removed] == 0).all()
        assert torch.equal(got["pasted"][~removed], want[~removed])
        assert torch.equal(got["pasted"][removed], got["reconstruction"][removed])
    assert not result.reconstruction.requires_grad
    assert (model.reconstruct(images, 0.5, noise, fill=127.0).masked[result.mask] == 127).all()


def test_reconstruct_takes_masks_and_ragged_ratios():
    model = small(torch.float32)
    images, noise = inputs(model)
    result = model.reconstruct(images, [0.25, 0.5, 0.75], noise)
    assert result.mask.float().mean((1, 2, 3)).tolist() == [0.25, 0.5, 0.75]
    removed = torch.zeros(3, 16, dtype=torch.bool)
    removed[:, 3] = True
    assert torch.equal(model.reconstruct(images, mask=removed).mask[0, 0, :8, 24:], torch.ones(8, 8, dtype=torch.bool))


def test_patchify_is_the_target_layout_and_inverts():
    model = small(img_size=(16, 24))
    images, _ = inputs(model)
    assert torch.equal(model.patchify(images), plain_twin(model).patchify(images))
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


@pytest.mark.parametrize("pred", ["masked", "full"])
def test_autocast(pred):
    """bfloat16 products, float32 loss, close to the plain eager MAE under the same autocast."""
    model = small(torch.float32, norm_pix_loss=True)
    twin = plain_twin(model)
    exact = small(torch.float64, norm_pix_loss=True)
    images, noise = inputs(model)
    want, _, _ = exact(images.double(), 0.75, noise)
    want.backward()
    errors = []
    for candidate, extra in ((model, {"pred": pred}), (twin, {})):
        with torch.autocast("cpu", torch.bfloat16):
            loss, out, _ = candidate(images, 0.75, noise, **extra)
        loss.backward()
        assert loss.dtype is torch.float32
        assert out.dtype is torch.bfloat16
        assert loss.item() == pytest.approx(want.item(), rel=1e-2)
        assert all(g.dtype is torch.float32 for g in gradients(candidate).values())
        got = {k: g.double() for k, g in gradients(candidate).items()}
        total = sum((got[k] - g).norm() ** 2 for k, g in gradients(exact).items()).sqrt()
        errors.append((total / sum(g.norm() ** 2 for g in gradients(exact).values()).sqrt()).item())
    assert errors[0] < 1.5 * errors[1] + 1e-4, errors
    assert errors[0] < 0.05, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(dtype):
    model, exact = small(dtype), small(torch.float64)
    images, noise = inputs(model)
    loss, out, _ = model(images, 0.75, noise)
    loss.backward()
    assert loss.dtype is torch.float32
    assert out.dtype is dtype
    assert loss.item() == pytest.approx(exact(images.double(), 0.75, noise)[0].item(), rel=2e-2)
    assert all(torch.isfinite(g).all() and g.dtype is dtype for g in gradients(model).values())


@pytest.mark.parametrize("pred", ["masked", "full"])
def test_compile_the_whole_step(pred):
    torch._dynamo.reset()
    model = small(torch.float32, norm_pix_loss=True, positions="learned")
    images, noise = inputs(model)
    loss, _, mask = model(images, 0.75, noise, pred=pred)
    loss.backward()
    want = {k: g.clone() for k, g in gradients(model).items()}
    model.zero_grad()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, _, got_mask = step(images, 0.75, noise, pred=pred)
    got.backward()
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(mask, got_mask)
    error, name = largest_error(gradients(model), want)
    assert error < 1e-5, name


def test_compile_with_other_batches_and_ratios():
    """The second batch size makes a graph for all of them, at every ratio that keeps as many patches."""
    torch._dynamo.reset()
    model = small(torch.float32, depth=1, decoder_depth=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for batch, ratio in ((3, 0.75), (4, 0.5), (5, 0.5), (6, 0.49)):
        images, noise = inputs(model, batch)
        got = step(images, ratio, noise)[0]
        got.backward()
        assert got.item() == pytest.approx(model(images, ratio, noise)[0].item(), rel=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_compile_encode_reconstruct_and_autocast():
    torch._dynamo.reset()
    model = small(torch.float32, depth=1, decoder_depth=1)
    images, noise = inputs(model)
    encode, reconstruct = (
        torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model.encode, model.reconstruct)
    )
    torch.testing.assert_close(encode(images), model.encode(images))
    want = model.reconstruct(images, 0.5, noise)
    torch.testing.assert_close(reconstruct(images, 0.5, noise).pasted, want.pasted)
    with torch.autocast("cpu", torch.bfloat16):
        assert encode(images).dtype is model.encode(images).dtype


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    model = small(torch.float32, depth=1, decoder_depth=1, norm_pix_loss=True)
    images, noise = inputs(model)
    loss = model(images, 0.75, noise)[0]
    loss.backward()
    want = {k: g.clone() for k, g in gradients(model).items()}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(images, 0.75, noise)[0]
    got.backward()
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    error, name = largest_error(gradients(model), want)
    assert error < 1e-4, name


@pytest.mark.parametrize("ratio", [0.75, [0.75, 0.5, 0.25]])
def test_recompute_changes_memory_only(ratio):
    model = small(norm_pix_loss=True)
    images, noise = inputs(model)
    kept = []

    def keep(t):
        kept[-1] += 0 if isinstance(t, nn.Parameter) else t.nbytes
        return t

    def step(recompute):
        kept.append(0)
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(images, ratio, noise)[0].backward()

    step(False)
    want = {k: g.clone() for k, g in gradients(model).items()}
    model.zero_grad()
    step(True)
    assert kept[1] < 0.6 * kept[0]
    error, name = largest_error(gradients(model), want)
    assert error < 1e-12, name


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_has_no_unused_parameters(process_group):
    """DistributedDataParallel refuses the next step if a parameter got no gradient in this one."""
    model = small(torch.float32, positions="learned")
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    images, noise = inputs(model)
    for ratio, pred in ((0.75, "masked"), (0.5, "full"), ([0.5, 0.75, 0.25], "masked"), (0.75, "masked")):
        optimizer.zero_grad()
        parallel(images, ratio, noise, pred=pred)[0].backward()
        assert all(g.abs().sum() > 0 for name, g in gradients(model).items() if not name.endswith("qkv.bias"))
        optimizer.step()


def test_images_need_not_be_contiguous():
    model = small()
    images, noise = inputs(model)
    want = model(images, 0.75, noise)[0]
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    assert model(strided, 0.75, noise)[0].item() == want.item()
    assert model(images.to(memory_format=torch.channels_last), 0.75, noise)[0].item() == want.item()


def test_it_learns():
    """A few steps on one batch lower the loss: parts are wired, not only shaped."""
    torch.manual_seed(0)
    model = models.create("mae_tiny", img_size=32, patch_size=8, depth=2, decoder_depth=1, embed_dim=48, num_heads=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ramp = torch.linspace(-1, 1, 32)
    images = torch.stack([ramp[:, None] * a + ramp * b for a, b in ((1, 0), (0, 1), (1, 1), (-1, 1))])
    images = images[:, None].expand(-1, 3, -1, -1)
    losses = []
    for _ in range(60):
        loss = model(images)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
