"""The model against a plain eager MAE on copied weights and noise, in float64: loss, predictions, every gradient."""

from __future__ import annotations

import pytest
import torch

import maefast
from maefast.ops import _dispatch
from tests.models.common import backends, gradients, inputs, largest_error, plain_twin, small

CASES = {
    "plain": {},
    "norm_pix": {"norm_pix_loss": True},
    "not_square": {"img_size": (32, 56), "norm_pix_loss": True},
    "patches_not_square": {"img_size": (24, 40), "patch_size": (4, 10)},
    "spectrogram": {"in_chans": 1, "img_size": (16, 48)},
    "six_channels": {"in_chans": 6, "norm_pix_loss": True},
    "patch_14": {"img_size": 56, "patch_size": 14},
    "learned_positions": {"positions": "learned", "norm_pix_loss": True},
    "one_block_each": {"depth": 1, "decoder_depth": 1, "mlp_ratio": 2.5},
}


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("pred", ["masked", "full"])
@pytest.mark.parametrize("case", CASES)
def test_loss_prediction_and_gradients(case, pred, backend):
    model = small(**CASES[case])
    twin = plain_twin(model)
    images, noise = inputs(model)
    with maefast.backend(backend):
        loss, out, mask = model(images, 0.75, noise, pred=pred)
        loss.backward()
    want, want_out, want_mask = twin(images, 0.75, noise)
    want.backward()

    assert loss.dtype is torch.float64
    assert abs(loss.item() - want.item()) < 1e-12
    assert torch.equal(mask, want_mask.float())
    if pred == "masked":  # in plan order: noise order
        ids = model.plan(images, 0.75, noise).ids_masked
        want_out = want_out.gather(1, ids[..., None].expand(-1, -1, want_out.shape[-1]))
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-12)
    error, name = largest_error(gradients(model), gradients(twin))
    assert error < 1e-10, name


@pytest.mark.parametrize(
    ("backend", "device"), [("reference", "cpu"), ("cpu", "cpu"), pytest.param("auto", "cuda", marks=pytest.mark.gpu)]
)
def test_float32(backend, device):
    """With every kernel that serves float32, attention included: float32 rounding of the float64 result."""
    if backend == "cpu" and not {"attention", "token_mask"} <= _dispatch.CPU_OPS:
        pytest.skip("the C++ kernels are not built")
    model, exact = small(torch.float32, norm_pix_loss=True), small(torch.float64, norm_pix_loss=True)
    images, noise = inputs(model)
    with maefast.backend(backend):
        loss, _, mask = model.to(device)(images.to(device), 0.75, noise.to(device))
        loss.backward()
    model, mask = model.cpu(), mask.cpu()
    want, _, want_mask = plain_twin(exact)(images.double(), 0.75, noise)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(mask, want_mask.float())
    exact(images.double(), 0.75, noise)[0].backward()
    error, name = largest_error({k: g.double() for k, g in gradients(model).items()}, gradients(exact))
    assert error < 1e-5, name


@pytest.mark.parametrize("ratio", [0.0625, 0.3, 0.5, 0.9, 1.0])
def test_mask_ratios(ratio):
    """One patch masked; odd counts; nothing but the class token visible."""
    model = small(norm_pix_loss=True)
    twin = plain_twin(model)
    images, noise = inputs(model)
    loss, out, mask = model(images, ratio, noise)
    loss.backward()
    want, _, want_mask = twin(images, ratio, noise)
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-12
    assert torch.equal(mask, want_mask.float())
    assert out.shape[1] == int(mask[0].sum())
    trained = {k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    wanted = {k: p.grad for k, p in twin.named_parameters() if k in trained}
    error, name = largest_error(trained, wanted)
    assert error < 1e-10, name


def test_gradient_of_the_images():
    """Through the embedding of visible patches and through the target of masked ones."""
    model = small(norm_pix_loss=True)
    images, noise = inputs(model)
    grads = []
    for candidate in (model, plain_twin(model)):
        leaf = images.clone().requires_grad_()
        candidate(leaf, 0.75, noise)[0].backward()
        grads.append(leaf.grad)
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() < 1e-10


def test_three_steps_of_adamw_stay_equal():
    model = small(norm_pix_loss=True)
    twin = plain_twin(model)
    losses = []
    for candidate in (model, twin):
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-2, weight_decay=0.05)
        for step in range(3):
            images, noise = inputs(model, seed=step)
            loss = candidate(images, 0.75, noise)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-9)
    assert losses[0] != losses[2]


def test_the_draw_is_the_original_s():
    """Same seed, same mask, and the generator is left where the original leaves it."""
    model = small(torch.float32)
    twin = plain_twin(model)
    images, _ = inputs(model)
    torch.manual_seed(5)
    mask = model(images, 0.6)[2]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    want = twin(images, 0.6)[2]
    assert torch.equal(mask, want)
    torch.manual_seed(5)
    torch.rand(images.shape[0], model.num_patches)
    assert torch.equal(after, torch.get_rng_state())


def test_masked_pixels_do_not_leak():
    """Latents are the same bit for bit whatever stands in the masked patches; the loss is not."""
    model = small(torch.float32)
    images, noise = inputs(model)
    plan = model.plan(images, 0.75, noise)
    removed = model.unpatchify(plan.mask[..., None].expand(-1, -1, 8 * 8 * 3))
    other = torch.where(removed, torch.full_like(images, float("nan")), images)
    latent = model.encode_visible(images, plan)
    assert torch.equal(latent, model.encode_visible(other, plan))
    changed = torch.where(removed, images + 1, images)
    assert not torch.equal(model(images, 0.75, noise)[0], model(changed, 0.75, noise)[0])
    visible = torch.where(removed, images, images + 1)
    assert not torch.equal(latent, model.encode_visible(visible, plan))


def test_only_the_needed_work_is_done():
    """Rows that reach each part: visible patches are embedded, masked tokens alone leave the decoder."""
    model = small(torch.float32)
    images, noise = inputs(model)
    rows = {}

    def count(name):
        return lambda module, args: rows.__setitem__(name, args[0].shape[:-1].numel())

    last = model.decoder_blocks[-1]
    parts = {
        "embed": model.decoder_embed,
        "keys": last.norm1,
        "mlp": last.mlp,
        "norm": model.decoder_norm,
        "head": model.decoder_pred,
    }
    for name, module in parts.items():
        module.register_forward_pre_hook(count(name))
    model(images, 0.75, noise)
    tokens, masked = 3 * 17, 3 * 12
    assert rows == {"embed": 3 * 5, "keys": tokens, "mlp": masked, "norm": masked, "head": masked}
    model(images, [0.75, 0.5, 0.25], noise)
    assert rows["keys"] == tokens
    assert rows["mlp"] == rows["head"] == 12 + 8 + 4


def test_two_runs_agree_bit_for_bit():
    model = small(torch.float32, positions="learned")
    images, noise = inputs(model)
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(images, 0.75, noise)[0]
        loss.backward()
        runs.append([loss.detach(), *(g.clone() for g in gradients(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
