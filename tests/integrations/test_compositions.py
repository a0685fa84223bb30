"""Accelerated models in the hands of other libraries: each test states a promise, and docs/drop-in.md lists them."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import maefast
from maefast import ops
from maefast.bench.peers.public.mae import Block
from tests.integrations import test_hf_vitmae, test_mae
from tests.integrations.changes import outcome
from tests.integrations.common import DropIn, gradient_error, relative, tensors
from tests.integrations.test_changes import same

FAMILIES = {"mae": test_mae.TestMAE, "hf_vitmae": test_hf_vitmae.TestViTMAE}


@pytest.fixture(params=FAMILIES)
def family(request) -> DropIn:
    return FAMILIES[request.param]()


@pytest.fixture
def nodes(monkeypatch) -> list:
    """Grows by one for every block that runs as one node."""
    calls, node = [], ops.transformer_block
    monkeypatch.setattr(ops, "transformer_block", lambda *args, **kwargs: calls.append(1) or node(*args, **kwargs))
    return calls


def loss_of(family: DropIn, model: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a guard failed
        return family.loss(family.call(model, dtype))


# --- adapters and quantised weights -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(family, when, nodes):
    """LoRA on every linear layer: outputs and gradients; merged, blocks are one node again."""
    peft = pytest.importorskip("peft")
    model = family.build(torch.float64)
    fast = copy.deepcopy(model)
    targets = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if type(part) is nn.Linear})
    pair = []
    for net in (model, fast):
        if net is fast and when == "after":
            maefast.accelerate(net)
        torch.manual_seed(0)
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        pair.append(net)
    model, fast = pair
    if when == "before":
        maefast.accelerate(fast)
    nodes.clear()
    for net in pair:
        loss_of(family, net).backward()
    assert gradient_error(fast, model) < 1e-9
    for context in ("adapted", "disabled", "merged"):
        for net in pair:
            if context == "merged":
                net.merge_adapter()
        if context == "disabled":
            with model.disable_adapter(), fast.disable_adapter():
                want, got = loss_of(family, model), loss_of(family, fast)
        else:
            want, got = loss_of(family, model), loss_of(family, fast)
        assert relative(got, want) < 1e-10, context
    assert not nodes
    done = maefast.accelerate(fast.merge_and_unload())
    nodes.clear()
    assert relative(loss_of(family, done), want) < 1e-10
    assert len(nodes) == 4  # blocks of encoder and decoder


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["all", "attention", "mlp"])
def test_torchao(family, when, part, nodes):
    """Weights of eight bits, which are tensors of another kind: their layers are called, whatever else there is."""
    quantization = pytest.importorskip("torchao.quantization")
    wanted = {"all": "", "attention": "att", "mlp": "mlp"}[part]

    def quantise(model: nn.Module) -> None:
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda m, name: isinstance(m, nn.Linear) and wanted in name,
        )

    model = family.build().eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    if when == "after":
        maefast.accelerate(fast)
    quantise(model)
    quantise(fast)
    if when == "before":
        maefast.accelerate(fast)
    with torch.no_grad():
        nodes.clear()
        found = [tensors(family.call(net)) for net in (model, fast)]
    assert not nodes
    for want, got in zip(*found, strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_bitsandbytes(family, when):
    """A Linear of another class in the place of torch's."""
    library = pytest.importorskip("bitsandbytes")

    def quantise(model: nn.Module) -> None:
        for name, part in list(model.named_modules()):
            if type(part) is nn.Linear and "att" in name:
                new = library.nn.Linear8bitLt(part.in_features, part.out_features, part.bias is not None, False)
                new.load_state_dict(part.state_dict())
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, new.to("cpu"))

    model = family.build().eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    if when == "after":
        maefast.accelerate(fast)
    quantise(model)
    quantise(fast)
    if when == "before":
        maefast.accelerate(fast)
        assert "Linear8bitLt" in str(maefast.report(fast))
    with torch.no_grad():
        found = [tensors(family.call(net)) for net in (model, fast)]
    for want, got in zip(*found, strict=True):
        assert relative(got, want) < 1e-2  # its kernel rounds activations to eight bits


# --- averages -----------------------------------------------------------------------------------------------


def lerp(average: nn.Module, model: nn.Module) -> None:
    """As timm's `ModelEmaV3` updates its copy."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values()):
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.3)


@pytest.mark.parametrize("how", ["AveragedModel", "deepcopy"])
def test_averages(family, how, nodes):
    """The average of an accelerated model is accelerated, and is that of its twin."""
    found = []
    for net in family.pair(torch.float64):
        averaged = (
            AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7)) if how == "AveragedModel" else copy.deepcopy(net)
        )
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(family, net).backward()
            optimizer.step()
            averaged.update_parameters(net) if how == "AveragedModel" else lerp(averaged, net)
        nodes.clear()
        with torch.no_grad():
            found.append((loss_of(family, averaged.eval()), len(nodes)))
    (want, none), (got, count) = found
    assert relative(got, want) < 1e-9
    assert (none, count) == (0, 4)


# --- torch --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "reduce-overhead"}, {"fullgraph": True}, {"fullgraph": True, "backend": "aot_eager"}],
    ids=["default", "reduce-overhead", "fullgraph", "fullgraph aot_eager"],
)
def test_compile(options):
    """No mode breaks the graph of facebookresearch/mae. Inductor draws random numbers of its own; where it is told to
    draw those of torch, all is equal."""
    torch._dynamo.reset()
    family = FAMILIES["mae"]()
    model, fast = family.pair()
    compiled = torch.compile(fast, **options)
    want = family.loss(family.call(model))
    want.backward()
    with torch._inductor.config.patch(fallback_random=True):
        got = family.loss(family.call(compiled))
        got.backward()
    assert relative(got, want) < 1e-5
    assert gradient_error(fast, model) < 1e-3


@pytest.mark.parametrize("kind", CheckpointImpl)
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpoint_wrapper(kind, when, nodes):
    """Blocks in a wrapper run as one node, and once more in the backward."""
    family = FAMILIES["mae"]()
    model = family.build(torch.float64)
    fast = copy.deepcopy(model)
    if when == "after":
        maefast.accelerate(fast)
    for net in (model, fast):
        apply_activation_checkpointing(
            net,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=kind),
            check_fn=lambda m: isinstance(m, Block),
        )
    if when == "before":
        maefast.accelerate(fast)
    nodes.clear()
    same(outcome(family, fast), outcome(family, model))
    assert len(nodes) == 8


# --- trainers -----------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield pytest.importorskip("accelerate").Accelerator(cpu=True, mixed_precision="bf16")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared(family, when, accelerator):
    """Accelerate, and with it HF Trainer, puts autocast around the forward of the object: ours runs inside of it."""
    model, fast = family.pair() if when == "before" else (family.build(), family.build())
    model, fast = accelerator.prepare_model(model), accelerator.prepare_model(fast)
    if when == "after":
        fast = family.accelerate(fast)
        assert "around that of its class: call maefast.accelerate before it" in str(maefast.report(fast))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for again in range(2):
            want, got = family.loss(family.call(model)), family.loss(family.call(fast))
            accelerator.backward(want)
            accelerator.backward(got)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
            assert gradient_error(fast, model) < 0.05
            lines = [line.split() for line in str(maefast.report(fast)).splitlines()]
            assert (["forward", "ran", "fast"] in [line[:3] for line in lines]) is (when == "before")
            if not again:
                maefast.accelerate(fast)  # again: what is around it stays
    fast = accelerator.unwrap_model(maefast.restore(fast), keep_fp32_wrapper=False)
    assert torch.equal(*(family.loss(family.call(net)) for net in (accelerator.unwrap_model(model, False), fast)))


def test_what_is_around_a_block(family):
    """A wrapper on one block sees tensors, and its change shows; one around a method that ours passes over runs."""
    model, fast = family.pair(torch.float64)
    for net in (model, fast):
        blocks = net.blocks if hasattr(net, "blocks") else net.vit.layers
        forward = blocks[1].forward
        blocks[1].forward = functools.wraps(forward)(lambda *args, forward=forward, **kw: forward(*args, **kw) * 2)
    loss_of(family, model).backward()
    loss_of(family, fast).backward()
    assert gradient_error(fast, model) < 1e-9


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "bf16-true"])
def test_fabric(family, precision):
    """The same curve, up to the rounding of the precision."""
    fabric_of = pytest.importorskip("lightning").fabric.Fabric
    curves = []
    for net in family.pair():
        fabric = fabric_of(accelerator="cpu", devices=1, precision=precision)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        model, optimizer = fabric.setup(net, optimizer)
        losses = []
        for step in range(3):
            loss = family.loss(family.call(model, seed=step))
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    tolerance = {"64-true": 1e-6, "32-true": 1e-5}.get(precision, 2e-2)
    assert relative(curves[1], curves[0]) < tolerance
    assert len(curves[0].unique()) > 1
