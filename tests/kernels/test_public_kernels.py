"""The public ops on backend="triton": registration, autograd, streams and CUDA graphs around the raw kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast.ops import gather_tokens, patch_embed, patch_loss, restore_tokens, token_mask
from tests.kernels.support import INTERPRET, TOLERANCE, random_tensor

BATCH, TOKENS, WIDTH, PATCH = 2, 6, 32, 8


def inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = 3 * PATCH * PATCH
    shapes = {
        "images": (BATCH, 3, 2 * PATCH, 3 * PATCH),
        "weight": (WIDTH, 3, PATCH, PATCH),
        "pos": (TOKENS, WIDTH),
        "lead": (1, WIDTH),
        "mask_token": (WIDTH,),
        "head": (values, WIDTH),
    }
    made = {name: random_tensor(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    made["weight"] /= values**0.5
    made["head"] /= WIDTH**0.5
    return {name: x.to(dtype).to(device).requires_grad_() for name, x in made.items()}


def step(backend: str, scores: torch.Tensor, keep, images, weight, pos, lead, mask_token, head) -> torch.Tensor:
    """A masked autoencoder whose transformer is a mean over the tokens: every token op once."""
    plan = token_mask(scores, keep, backend=backend)
    x = patch_embed(images, weight, None, plan, pos=pos, prefix=lead, backend=backend)
    full = restore_tokens(x, plan, mask_token, pos=torch.cat([lead, pos]), prefix=1, backend=backend)
    full = torch.tanh(full + full.mean(1, keepdim=True))  # or no visible token would reach a prediction
    masked = gather_tokens(full, plan, "masked", prefix=1, keep_prefix=False, backend=backend)
    return patch_loss(F.linear(masked, head), images, plan, PATCH, norm="mae", backend=backend)


@pytest.mark.parametrize("keep", [2, [1, 4]], ids=["uniform", "ragged"])
def test_a_step_equals_the_reference(device, dtype, keep):
    scores = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(0))
    low = inputs(device, dtype)
    high = {name: x.detach().cpu().double().requires_grad_() for name, x in low.items()}
    got, want = step("triton", scores.to(device), keep, **low), step("reference", scores, keep, **high)
    # The matrix products between the ops round, too: a few roundings more than the ops' own.
    slack = 20 if dtype is torch.float32 else 8
    for name, a, b in zip(
        ("loss", *low),
        (got, *torch.autograd.grad(got, list(low.values()))),
        (want, *torch.autograd.grad(want, list(high.values()))),
    ):
        a, b = a.detach().cpu().double(), b.detach()
        assert float(b.norm()) > 0
        error = (a - b).norm() / b.norm()
        print(f"{name}: relative error {float(error):.3g} of {slack * TOLERANCE[dtype]:.3g}")
        assert float(error) <= slack * TOLERANCE[dtype], f"{name}: relative error {float(error):.3g}"


def gpu_only(test):
    """Not collected by the interpreter at all, which would only skip it."""
    return pytest.mark.gpu(test) if not INTERPRET else None


@gpu_only
def test_cuda_graph(device, dtype):
    low = inputs(device, dtype)
    scores = torch.rand(BATCH, TOKENS, device=device)

    def run():
        loss = step("triton", scores, 2, **low)
        return loss, *torch.autograd.grad(loss, list(low.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):  # a replay must read the new scores, not the captured ones
        scores.copy_(torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for a, b in zip(replayed, run()):
            assert torch.equal(a, b)


@gpu_only
def test_two_runs_agree_bit_for_bit(device, dtype):
    batch, tokens, width = 64, 197, 512
    scores = torch.rand(batch, tokens, device=device)
    plan = token_mask(scores, 49, backend="triton")
    x = torch.randn(batch, 50, width, device=device, dtype=dtype, requires_grad=True)
    token = torch.randn(width, device=device, dtype=dtype, requires_grad=True)
    pos = torch.randn(tokens + 1, width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, tokens + 1, width, device=device, dtype=dtype)

    def run():
        out = restore_tokens(x, plan, token, pos=pos, prefix=1, backend="triton")
        return torch.autograd.grad(out, (x, token, pos), grad)

    first = run()
    for _ in range(5):
        for a, b in zip(first, run()):
            assert torch.equal(a, b)


@gpu_only
def test_addresses_beyond_2_to_the_31(device):
    batch, tokens, width = 2100, 1024, 1024  # 2.2e9 elements of float16, 4.4 GB
    if torch.cuda.get_device_properties(0).total_memory < 16e9:
        pytest.skip("needs 16 GB of device memory")
    plan = token_mask(torch.rand(batch, tokens, device=device), 256, backend="triton")
    x = torch.empty(batch, tokens, width, device=device, dtype=torch.float16)
    x[:] = torch.arange(batch, device=device)[:, None, None] % 1000  # each sample holds its own number
    x[:, :, 0] = torch.arange(tokens, device=device)  # and each token its position
    out = gather_tokens(x, plan, backend="triton")
    assert torch.equal(out[:, :, 0].long(), plan.ids_keep)
    assert torch.equal(out[:, 5, 1:], x[:, 5, 1:])
    (grad,) = torch.autograd.grad(gather_tokens(x.requires_grad_(), plan, backend="triton"), x, out)
    assert torch.equal(grad[:, :, 0].long(), torch.where(plan.mask, 0, torch.arange(tokens, device=device)))
