"""What a graphed step refuses, in words that say what to do; and what is left when a capture fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast import GraphCaptureError, masking
from tests.graphs.common import adamw, batches, loop, make, same
from tests.graphs.common import taped as taped


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"clip": 0.0}, ValueError, "clip must be a positive number or None, got 0.0"),
        ({"clip": float("nan")}, ValueError, "clip must be a positive number"),
        ({"clip": True}, ValueError, "clip must be a positive number"),
        ({"warmup": 0}, ValueError, "warmup must be an int of at least 1, got 0"),
        ({"accumulate": 1.5}, ValueError, "accumulate must be an int of at least 1, got 1.5"),
        ({"autocast": torch.float16}, ValueError, "needs a GradScaler.*use autocast=torch.bfloat16"),
        ({"autocast": True}, ValueError, "autocast must be torch.bfloat16 or None, got True"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_settings(change, error, message):
    model = make()
    settings = {"model": model, "optimizer": adamw(model), **change}
    with pytest.raises(error, match=message):
        maefast.graphed_step(settings.pop("model"), settings.pop("optimizer"), **settings)


def test_what_belongs_to_several_devices_or_processes(monkeypatch):
    model = make()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        maefast.graphed_step(make(), optimizer)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        maefast.graphed_step(nn.Sequential(model, nn.Linear(2, 2, device="meta")), optimizer)
    with pytest.raises(ValueError, match="contains a DataParallel: a graphed step is one process's alone"):
        maefast.graphed_step(nn.DataParallel(model), optimizer)
    optimizer.scaler = object()  # as Accelerate's has
    with pytest.raises(ValueError, match="optimizer has a GradScaler"):
        maefast.graphed_step(model, optimizer)
    del optimizer.scaler
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes train together"):
        maefast.graphed_step(model, optimizer)


def test_hooks():
    model = make()
    handle = model.cls_token.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="cls_token has a post-accumulate-gradient hook"):
        maefast.graphed_step(model, adamw(model))
    handle.remove()
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="optimizer has a step post-hook"):
        maefast.graphed_step(model, optimizer)


def test_optimizers_that_cannot_be_captured(taped):
    model = make()
    for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adagrad(model.parameters(), 0.1)):
        with pytest.raises(TypeError, match=r"(SGD|Adagrad) \(group 0\) has no `capturable`.*AdamW"):
            maefast.graphed_step(model, optimizer)


@pytest.fixture(params=["plain", "captured"])
def step(request):
    """After `warmup` steps and a replay."""
    if request.param == "captured":
        request.getfixturevalue("taped")
    model = make()
    step = maefast.graphed_step(model, adamw(model), warmup=1)
    for images in batches(model, 3):
        step(images)
    return step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: ((x[:2],), {}), r"input 0 is float32 \[2, 3, 16, 16\], but the step was made for float32 \[3, 3,"),
        (lambda x: ((x.double(),), {}), r"input 0 is float64 \[3, 3, 16, 16\], but .* float32"),
        (lambda x: ((x, 0.5), {}), r"made for the arguments \(<tensor>\), not \(<tensor>, 0.5\): numbers"),
        (lambda x: ((), {"images": x}), r"not \(images=<tensor>\)"),
        (lambda x: ((x.to("meta"),), {}), "input 0 is on meta, but the step takes tensors on cpu"),
    ],
)
def test_other_arguments(step, arguments, message):
    images = batches(step.model, 1)[0]
    args, keywords = arguments(images)
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(ValueError, match=message):
        step(*args, **keywords)
    assert all(map(torch.equal, before.values(), step.model.state_dict().values()))
    step(images)  # and goes on
    step.reset()
    if "meta" not in message:
        step(*(x.float() if isinstance(x, torch.Tensor) else x for x in args), **keywords)


def test_arguments_that_no_graph_can_take(step):
    images = batches(step.model, 1)[0]
    with pytest.raises(TypeError, match=r"mask is a TokenMask; a step takes tensors, numbers and strings"):
        step(images, mask=masking.random(3, 16, 0.75))
    with pytest.raises(ValueError, match="input 0 requires a gradient"):
        step(images.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"outside of torch.autocast"):
        step(images.detach())


def test_masks_that_no_graph_can_hold(step):
    images = batches(step.model, 1)[0]
    step.reset()
    with pytest.raises(ValueError, match="needs one mask ratio or count for all samples"):
        step(images, [0.75, 0.5, 0.5])
    step(images, [0.75] * 3)  # one count

    def loss(images):
        return step.model(images, mask=masking.block(3, (4, 4), 0.75))[0]

    blocks = maefast.graphed_step(step.model, step.optimizer, loss=loss)
    with pytest.raises(ValueError, match="block masks are drawn on the host"):
        blocks(images)
    plan = masking.block(3, (4, 4), 0.75)  # outside of a step it may

    def given(images, mask):
        return step.model(images, mask=masking.from_bool(mask, keep=4))[0]

    blocks = maefast.graphed_step(step.model, step.optimizer, loss=given)
    blocks(images, plan.mask)


def test_a_batch_that_the_model_refuses_is_not_the_shape_from_then_on(taped):
    model = make()
    step = maefast.graphed_step(model, adamw(model))
    with pytest.raises(ValueError, match="this model takes images"):
        step(torch.randn(3, 3, 8, 8))
    step(batches(model, 1)[0])


def test_accumulation_wants_its_micro_batches():
    model = make()
    step = maefast.graphed_step(model, adamw(model), accumulate=2)
    images = batches(model, 1)[0]
    for args, keywords in (((images,), {}), ((images, images), {"mask_ratio": 0.5})):
        with pytest.raises(ValueError, match="takes its 2 micro-batches"):
            step(*args, **keywords)


@pytest.mark.parametrize("output", [None, "text", torch.ones(2), torch.ones((), dtype=torch.int64), {}, ()])
def test_a_model_without_a_loss(output):
    model = make()
    step = maefast.graphed_step(model, adamw(model), loss=lambda x: output)
    with pytest.raises(TypeError, match="must return its loss, a scalar"):
        step(batches(model, 1)[0])


def change_decay(step):
    step.optimizer.param_groups[0]["weight_decay"] = 0.1


def add_group(step):
    step.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def freeze(step):
    step.model.cls_token.requires_grad_(False)


def evaluate(step):
    step.model.eval()


def move(step):
    step.model.cls_token.data = step.model.cls_token.data.clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_decay, "optimiser was changed: weight_decay of group 0 was 0.05, now 0.1"),
        (add_group, "optimiser was changed: 2 groups of parameters, now 3"),
        (freeze, "requires_grad of some parameters was changed"),
        (evaluate, r"another mode by train\(\) or eval\(\)"),
        (move, "some parameters were replaced or moved"),
    ],
)
def test_what_a_graph_holds_may_not_change(taped, change, message):
    model = make()
    step = maefast.graphed_step(model, adamw(model), warmup=1)
    data = batches(model, 6)
    for images in data[:3]:
        step(images)
    change(step)
    with pytest.raises(ValueError, match=rf"{message}.*reset\(\) to capture anew"):
        step(data[3])
    step.reset()
    for images in data[3:]:
        step(images)
    assert step.captured


@pytest.mark.parametrize("kind", ["mae", "spark"])
@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_a_failed_capture_leaves_everything_as_it_was(taped, kind, where, monkeypatch):
    """What the step had drawn, written and counted is put back; the loop can go on without a graph."""
    model, other = make(kind), make(kind)
    optimizer, second = adamw(model), adamw(other)
    data = batches(model, 5)
    waits = {"on": False}

    def trouble(tensor):
        if waits["on"]:
            tensor.sum().item()
        return tensor

    if where == "backward":
        name = "patch_embed.proj.weight" if kind == "mae" else "dense_decoder.proj.weight"
        dict(other.named_parameters())[name].register_hook(lambda grad: trouble(grad))
    elif where == "update":
        original = type(second).step
        monkeypatch.setattr(type(second), "step", lambda self: (original(self), trouble(torch.ones(1)))[0])

    def loss(images):
        found = other(images)[0]
        return trouble(found) if where == "forward" else found

    torch.manual_seed(5)
    wanted = loop(model, optimizer, data)
    torch.manual_seed(5)
    step = maefast.graphed_step(other, second, loss=loss, warmup=2)
    found = [step(images) for images in data[:2]]
    waits["on"] = True
    with pytest.raises(GraphCaptureError, match=r"cannot be captured.*not permitted.*\.item\(\)"):
        step(data[2])
    assert not step.captured
    assert all(parameter.grad is None for parameter in other.parameters())
    waits["on"] = False
    found += [step(images) for images in data[2:]]  # the same batch again, now captured
    assert step.captured
    assert all(map(torch.equal, found, wanted))
    assert same(model, other, optimizer, second)


def test_hints():
    from maefast.graphs.capture import explain

    text = "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned."
    assert "different numbers of tokens" in explain(RuntimeError(text))
    text = "Attempt to increase offset for a CUDA generator not in capture mode."
    assert "give it as `generator`" in explain(RuntimeError(text))
    assert ".item()" in explain(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    assert explain(KeyError()).endswith("KeyError")
    with pytest.raises(RuntimeError) as inside:
        torch.nn.functional.gelu(torch.zeros(2, 3)).view(5)
    assert "(test_checks.py:" in explain(inside.value)
