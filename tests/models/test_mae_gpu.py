"""One training step on a CUDA device: no host sync, the same twice, as accurate as the plain model."""

from __future__ import annotations

import pytest
import torch

from tests.models.common import gradients, inputs, plain_twin, small

pytestmark = pytest.mark.gpu


def on_cuda(**overrides):
    model = small(torch.float32, norm_pix_loss=True, **overrides)
    images, noise = inputs(model)
    return model.cuda(), images.cuda(), noise.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_sync(dtype):
    model, images, noise = on_cuda()

    def step(**kwargs):
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            model(images, 0.75, **kwargs)[0].backward()

    step(), step(noise=noise)  # compile kernels, fill caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(), step(noise=noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_agree_bit_for_bit():
    model, images, noise = on_cuda(positions="learned")
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(images, 0.75, noise)[0]
        loss.backward()
        runs.append([loss.detach(), *(g.clone() for g in gradients(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_as_accurate_as_plain(dtype):
    model, images, noise = on_cuda()
    exact = small(torch.float64, norm_pix_loss=True)
    exact(images.double().cpu(), 0.75, noise.cpu())[0].backward()
    wanted = gradients(exact)
    scale = sum(g.norm() ** 2 for g in wanted.values()).sqrt()
    errors = []
    for candidate in (model, plain_twin(model)):
        with torch.autocast("cuda", dtype):
            loss = candidate(images, 0.75, noise)[0]
        (loss * 1024).backward()  # as a loss scaler does
        got = {k: g.double().cpu() / 1024 for k, g in gradients(candidate).items()}
        errors.append((sum((got[k] - wanted[k]).norm() ** 2 for k in wanted).sqrt() / scale).item())
    assert errors[0] < 1.5 * errors[1] + 1e-4, errors


def test_ragged_batch_equals_samples_alone():
    model, images, noise = on_cuda()
    ratios = [0.75, 0.25, 0.5]
    loss, _, _ = model(images, ratios, noise)
    alone = [model(images[i : i + 1], r, noise[i : i + 1]) for i, r in enumerate(ratios)]
    counts = torch.stack([one[2].sum() for one in alone])
    want = sum(one[0] * count for one, count in zip(alone, counts)) / counts.sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
