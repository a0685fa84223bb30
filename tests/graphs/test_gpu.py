"""Graphed steps on a CUDA device: nothing waits for it, masks are those of the loop, a failure leaves no trace."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import maefast
from maefast import GraphCaptureError, masking
from tests.graphs.common import adamw, batches, loop, make

pytestmark = pytest.mark.gpu
KINDS = ("mae", "spark", "fcmae")
DTYPES = (None, torch.bfloat16)
RATE = 2.0**-12  # small: AdamW's first steps magnify rounding


@contextlib.contextmanager
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cuda(kind: str = "mae", count: int = 8):
    """(model, optimizer, batches); the optimiser's rate is a tensor, as a graph's is."""
    model = make(kind, "cuda")
    optimizer = adamw(model, lr=torch.tensor(RATE, device="cuda"))
    return model, optimizer, batches(model, count, device="cuda")


@pytest.mark.parametrize("autocast", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_never_waits(kind, autocast):
    """Forward, backward, clipping and AdamW, without a graph."""
    model, optimizer, data = on_cuda(kind)
    loop(model, optimizer, data[:2], clip=1.0, autocast=autocast)  # compiles kernels, fills caches
    with no_sync():
        loop(model, optimizer, data[2:], clip=1.0, autocast=autocast)


@pytest.mark.parametrize("autocast", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_graphed_step_never_waits_and_allocates_little(kind, autocast):
    model, optimizer, data = on_cuda(kind)
    pinned = [images.cpu().pin_memory() for images in data]
    step = maefast.graphed_step(model, optimizer, clip=1.0, autocast=autocast, warmup=2)
    step(data[0])
    with no_sync():
        step(data[1])
    step(data[2])  # captures
    assert step.captured
    held = torch.cuda.memory_allocated()
    with no_sync():
        for images in (*data[3:], *pinned):
            for group in optimizer.param_groups:
                group["lr"] = RATE  # written as a number
            loss = step(images)
    assert torch.cuda.memory_allocated() <= held + 4096
    assert loss.isfinite()


@pytest.mark.parametrize("autocast", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(kind, autocast):
    model, optimizer, data = on_cuda(kind)
    other, second, _ = on_cuda(kind)
    torch.manual_seed(5)
    wanted = loop(model, optimizer, data, clip=0.5, autocast=autocast)
    after = torch.rand(4, device="cuda")
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second, clip=0.5, autocast=autocast)
    found = [step(images) for images in data]
    assert step.captured
    assert torch.equal(torch.rand(4, device="cuda"), after)  # the generator is as far as in the loop
    # torch's own kernels do not promise the same bits twice.
    tolerance = 1e-3 if autocast is None else 2e-2
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=tolerance, atol=0)
    for (name, a), b in zip(model.named_buffers(), other.buffers()):  # of batch norms
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("own", [False, True])
def test_masks_are_those_of_the_loop_exactly(own):
    """From the default generator and from one that is given; a seed that is set in between holds."""
    model, optimizer, data = on_cuda()
    generator = torch.Generator("cuda").manual_seed(7) if own else None
    buffer = torch.zeros(3, 16, dtype=torch.bool, device="cuda")

    def loss(images):
        plan = masking.random(3, 16, 0.75, generator=generator, device="cuda")
        buffer.copy_(plan.mask)
        return model(images, mask=plan)[0]

    def seed():
        (torch.cuda if generator is None else generator).manual_seed(9)

    step = maefast.graphed_step(model, optimizer, loss=loss, generator=generator, warmup=2)
    found = []
    seed()
    for i, images in enumerate(data):
        if i == 6:
            seed()
        step(images)
        found.append(buffer.clone())
    seed()
    for i, mask in enumerate(found):
        if i == 6:
            seed()
        wanted = masking.random(3, 16, 0.75, generator=generator, device="cuda").mask
        assert torch.equal(mask, wanted), i
    assert not torch.equal(found[3], found[4])


def test_stochastic_depth_draws_on():
    model, optimizer, data = on_cuda("spark")
    step = maefast.graphed_step(model, optimizer, warmup=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    noise = torch.rand(3, model.num_patches, device="cuda")
    losses = [step(data[0], noise=noise).item() for _ in range(8)]
    assert len(set(losses)) > 1


def test_the_learning_rate_is_read_by_every_replay():
    model, optimizer, data = on_cuda()
    step = maefast.graphed_step(model, optimizer, warmup=1)
    step(data[0]), step(data[1])
    for rate, moves in ((0.0, False), (RATE, True), (0.0, False)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = model.decoder_pred.weight.clone()
        step(data[2])
        assert torch.equal(model.decoder_pred.weight, before) != moves


def test_accumulation():
    model, optimizer, data = on_cuda(count=12)
    step = maefast.graphed_step(model, optimizer, accumulate=2, clip=1.0, warmup=1)
    losses = [step(*pair) for pair in zip(data[::2], data[1::2])]
    assert step.captured
    assert torch.stack(losses).isfinite().all()
    assert step.grad_norm > 0


@pytest.mark.parametrize("where", ["forward", "backward", "python", "ragged"])
def test_a_failed_capture_leaves_the_process_usable(where):
    model, optimizer, data = on_cuda()
    trouble = {"on": False}

    def loss(images):
        if not trouble["on"]:
            return model(images)[0]
        if where == "python":
            raise KeyError("no such thing")
        if where == "ragged":  # around the samplers, which refuse it
            plan = maefast.ops.TokenMask.from_scores(torch.rand(3, 16, device="cuda"), [4, 5, 6])
            return model(images, mask=plan)[0]
        found = model(images)[0]
        if where == "forward":
            found.item()
        else:
            found.register_hook(lambda grad: grad * grad.item())
        return found

    step = maefast.graphed_step(model, optimizer, loss=loss, warmup=2)
    step(data[0]), step(data[1])
    before = [p.clone() for p in model.parameters()]
    state = torch.cuda.get_rng_state()
    trouble["on"] = True
    for _ in range(2):
        with pytest.raises(GraphCaptureError, match="cannot be captured as a CUDA graph"):
            step(data[2])
    trouble["on"] = False
    assert not step.captured
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(3, device="cuda").sum().item()  # the generator draws, the device can be read
    loop(model, optimizer, data[:1])
    for images in data[2:]:
        step(images)
    assert step.captured
    torch.cuda.synchronize()


def test_several_graphs_and_other_work_between(tmp_path):
    """Two steps, evaluation and an eager step in turn; the second graph is made while the first is in use."""
    model, optimizer, data = on_cuda()
    other, second, _ = on_cuda("fcmae")
    others = batches(other, 8, device="cuda")
    one, two = maefast.graphed_step(model, optimizer, warmup=1), maefast.graphed_step(other, second, warmup=3)
    for images, more in zip(data, others):
        one(images), two(more)
        with torch.no_grad():
            model.eval()
            model(images)
            model.train()
    assert one.captured
    assert two.captured
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not one.captured
    losses = [one(images) for images in data]
    assert torch.stack(losses).isfinite().all()


def test_devices():
    model, optimizer, _ = on_cuda()
    with pytest.raises(ValueError, match="generator is on cpu but the model is on cuda:0"):
        maefast.graphed_step(model, optimizer, generator=torch.Generator())
    with pytest.raises(TypeError, match=r"SGD \(group 0\) has no `capturable`"):
        maefast.graphed_step(model, torch.optim.SGD(model.parameters(), 0.1))
    module = nn.Linear(4, 4).cuda()
    step = maefast.graphed_step(
        module, torch.optim.SGD(module.parameters(), 0.1, fused=True), loss=lambda x: module(x).square().mean()
    )
    losses = [step(torch.ones(2, 4)).item() for _ in range(8)]  # from the host
    assert losses == sorted(losses, reverse=True)
