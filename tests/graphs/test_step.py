"""A graphed step equals the loop that it stands for, bit for bit: on a CPU, and captured on a tape."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import maefast
from maefast import masking
from maefast.graphs import recording
from tests.graphs.common import RATE, adamw, batches, loop, make, same
from tests.graphs.common import taped as taped

KINDS = ("mae", "spark", "fcmae")


@pytest.fixture
def how(request):
    if request.param == "captured":
        request.getfixturevalue("taped")
    return request.param


captured = pytest.mark.parametrize("how", ["plain", "captured"], indirect=True)


@captured
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(how, kind):
    """Masks, stochastic depth, batch norms, clipping and AdamW, over the warm-up, the capture and some replays."""
    model, other = make(kind), make(kind)
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 7)
    torch.manual_seed(5)
    wanted = loop(model, optimizer, data, clip=0.5)
    after = torch.rand(4)
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second, clip=0.5, warmup=2)
    found = [step(images) for images in data]
    assert step.captured == (how == "captured")
    assert all(map(torch.equal, found, wanted))
    assert same(model, other, optimizer, second)
    assert torch.equal(torch.rand(4), after)  # the generator is as far as in the loop
    if how == "captured":
        assert step._recorder.events == ["run"] * 2 + ["record"] + ["replay"] * 5


@captured
def test_a_generator_of_its_own(how):
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    data = batches(model, 6)
    wanted = loop(model, optimizer, data, generator=generators[0])
    step = maefast.graphed_step(other, second, generator=generators[1])
    before = torch.get_rng_state()
    found = [step(images) for images in data]
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert torch.equal(torch.get_rng_state(), before)  # only the one that was given is advanced


@captured
def test_masks_are_new_ones_in_every_step(how):
    """The mask is written into a buffer, by the step itself."""
    model, mask = make(), torch.zeros(3, 16, dtype=torch.bool)

    def loss(images):
        plan = masking.random(len(images), model.num_patches, 0.75)
        mask.copy_(plan.mask)
        return model(images, mask=plan)[0]

    step = maefast.graphed_step(model, adamw(model), loss=loss, warmup=1)
    seen = set()
    for images in batches(model, 6):
        step(images)
        assert mask.sum(1).tolist() == [12] * 3
        seen.add(tuple(mask.flatten().tolist()))
    assert len(seen) == 6


@captured
def test_bf16_autocast(how):
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 5)
    torch.manual_seed(5)
    wanted = loop(model, optimizer, data, autocast=torch.bfloat16)
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second, autocast=torch.bfloat16)
    assert all(map(torch.equal, [step(images) for images in data], wanted))
    assert same(model, other, optimizer, second)


@captured
@pytest.mark.parametrize("written", ["number", "scheduler"])
def test_the_learning_rate_follows_a_schedule(how, written):
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 8)

    def schedule(optimizer):
        if written == "scheduler":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0 ** -(step % 4)).step
        count = iter(range(1, 100))

        def write():
            number = next(count)
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = RATE * 2.0 ** -(number % 4 + i)

        return write

    torch.manual_seed(5)
    wanted = loop(model, optimizer, data, between=schedule(optimizer))
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second)
    between = schedule(second)
    found = []
    for images in data:
        found.append(step(images))
        between()
    assert all(map(torch.equal, found, wanted))
    assert same(model, other, optimizer, second)
    assert [float(g["lr"]) for g in second.param_groups] == [float(g["lr"]) for g in optimizer.param_groups]
    step.release()
    assert all(isinstance(group["lr"], float) for group in second.param_groups)


@captured
@pytest.mark.parametrize("shape", ["tensors", "tuples", "dicts"])
def test_accumulation(how, shape):
    """The mean over micro-batches of one step, as a loop does it."""
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 12)
    step = maefast.graphed_step(other, second, clip=0.1, accumulate=2)
    torch.manual_seed(5)
    wanted, norms = [], []
    for pair in zip(data[::2], data[1::2]):
        optimizer.zero_grad()
        total = 0
        for images in pair:
            loss = model(images)[0]
            (loss / 2).backward()
            total = total + loss.detach()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        wanted.append(total / 2)
    torch.manual_seed(5)
    wrap = {"tensors": lambda x: x, "tuples": lambda x: (x, 0.75), "dicts": lambda x: {"images": x}}[shape]
    found = []
    for pair, norm in zip(zip(data[::2], data[1::2]), norms):
        found.append(step(*map(wrap, pair)))
        assert torch.equal(step.grad_norm, norm)
    assert all(map(torch.equal, found, wanted))
    assert same(model, other, optimizer, second)


class Hf(nn.Module):
    """A model with Hugging Face's ways: keywords in, an object with a loss out; drawn masks are dropout's."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.layer, self.drop, self.as_dict = nn.Linear(6, 6), nn.Dropout(0.5), as_dict

    def forward(self, pixel_values, scale=1.0):
        loss = (self.drop(self.layer(pixel_values)) * scale - pixel_values).square().mean()
        return {"loss": loss, "logits": None} if self.as_dict else SimpleNamespace(loss=loss)


@captured
@pytest.mark.parametrize("as_dict", [True, False])
def test_models_of_others(how, as_dict):
    torch.manual_seed(0)
    model = Hf(as_dict)
    step = maefast.graphed_step(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True))
    data = torch.randn(8, 5, 6)
    losses = [step(pixel_values=data[0], scale=0.5).item() for _ in range(40)]
    assert losses[-1] < losses[0]
    assert len(set(losses)) == 40


def test_two_steps_of_one_model(taped):
    """A second step for the last, smaller batches: same parameters, same optimiser, in turn."""
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    data = [images[: 2 if i % 3 == 2 else 3] for i, images in enumerate(batches(model, 18))]
    rates = [RATE * 2.0 ** -(i % 5) for i in range(18)]

    def between():
        for group in optimizer.param_groups:
            group["lr"] = rates[len(seen)]
        seen.append(None)

    seen = []
    between()
    torch.manual_seed(5)
    wanted = loop(model, optimizer, data, between=lambda: between() if len(seen) < 18 else None)
    torch.manual_seed(5)
    steps = {size: maefast.graphed_step(other, second, warmup=2) for size in (2, 3)}
    found = []
    for images, rate in zip(data, rates):
        for group in second.param_groups:
            group["lr"] = rate
        found.append(steps[len(images)](images))
    assert all(step.captured for step in steps.values())
    assert all(map(torch.equal, found, wanted))
    assert same(model, other, optimizer, second)


def test_released_and_used_again(taped):
    model = make()
    optimizer = adamw(model)
    step = maefast.graphed_step(model, optimizer, warmup=1)
    for images in batches(model, 3):
        step(images)
    step.release()
    assert [group["lr"] for group in optimizer.param_groups] == [RATE, RATE]
    loop(model, optimizer, batches(model, 2))
    for images in batches(model, 3, size=2):  # another shape
        step(images)
    assert step.captured


def test_earlier_results_stay(taped):
    model = make()
    step = maefast.graphed_step(model, adamw(model), clip=1.0)
    losses, norms = [], []
    for images in batches(model, 6):
        losses.append(step(images))
        norms.append(step.grad_norm)
    assert len({loss.item() for loss in losses}) == len({norm.item() for norm in norms}) == 6
    assert not losses[-1].requires_grad


def test_the_optimizer_is_loaded_after_the_capture(taped):
    """load_state_dict makes new tensors: the step is captured anew, and goes on from what was loaded."""
    model, other = make(), make()
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 12)
    torch.manual_seed(5)
    loop(model, optimizer, data[:6])
    state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    torch.manual_seed(6)
    step = maefast.graphed_step(other, second, warmup=1)
    for images in data[:4]:
        step(images)
    second.load_state_dict(state)
    other.load_state_dict(weights)
    assert not step.captured
    torch.manual_seed(7)
    wanted = loop(model, optimizer, data[6:])
    torch.manual_seed(7)
    assert all(map(torch.equal, [step(images) for images in data[6:]], wanted))
    assert step.captured
    assert same(model, other, optimizer, second)


def test_inputs_may_change_their_memory(taped):
    """They are copied: one that is freed or written to afterwards does not matter."""
    model = make()
    step = maefast.graphed_step(model, adamw(model, lr=0.0), warmup=1)
    images, noise = batches(model, 1)[0], torch.rand(3, 16)
    first = step(images.clone(), noise=noise)
    for _ in range(3):
        copy = images.clone()
        assert torch.equal(step(copy, noise=noise), first)
        copy.fill_(float("nan"))


def test_the_code_knows_that_it_is_recorded(taped):
    model, seen = make(), []

    def loss(images):
        seen.append(recording())
        return model(images)[0]

    step = maefast.graphed_step(model, adamw(model), loss=loss, warmup=1)
    for images in batches(model, 4):
        step(images)
    assert seen == [True, True]  # the warm-up and the capture; a replay runs no Python
    assert not recording()
