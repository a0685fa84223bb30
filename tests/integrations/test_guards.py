"""Guards: whatever the model's own code reads is as it was compared, or that code runs."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.integrations import _code, _swap
from maefast.integrations._guards import Guards
from maefast.integrations._sites import Unguarded
from tests.integrations import test_hf_videomae, test_hf_vitmae, test_mae
from tests.integrations.common import gradient_error, relative
from tests.integrations.test_mae import SIZES, images

ROOT = MaskedAutoencoderViT
SWITCH = False  # read by `Globally`


def build(kind: type = ROOT) -> nn.Module:
    torch.manual_seed(0)
    return kind(**SIZES).double()


def pair(kind: type = ROOT) -> tuple[nn.Module, nn.Module]:
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, maefast.accelerate(copy.deepcopy(model))


def same(model: nn.Module, fast: nn.Module) -> None:
    """Outputs and gradients."""
    found = []
    for net in (model, fast):
        torch.manual_seed(1)
        net.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(net(images(torch.float64)))
        found[-1][0].backward()
    for a, b in zip(*found):
        assert relative(b, a) < 1e-11
    assert gradient_error(fast, model) < 1e-9


def runs(fast: nn.Module, method: str = "forward") -> str:
    (note,) = [note for note in maefast.report(fast).notes if note.method == method and not note.path]
    return note.runs


def fork(**methods) -> type:
    """A fork of the public code: the methods stand in the family's own class, and override nothing."""
    return type("MaskedAutoencoderViT", (nn.Module,), {**vars(ROOT), "__init__": _init, **methods})


def _init(self, **sizes):
    nn.Module.__init__(self)
    vars(self).update(vars(ROOT(**sizes)))


# --- switches and counters ----------------------------------------------------------------------------------


def l1_loss(self, imgs, pred, mask):
    target = self.patchify(imgs)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    diff = pred - (target - mean) / (var + 1e-6) ** 0.5
    each = diff.abs() if getattr(self, "l1", False) else diff**2
    return (each.mean(-1) * mask).sum() / mask.sum()


def by_options(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * 2 if self.options.l1 or self.flags["l1"] or self.steps[-1] > 3 else loss


def by_epoch(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * 3 if self.epoch > 2 else loss


def by_global(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * 4 if SWITCH else loss


def by_computed_name(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    return loss * getattr(self, "weight_of_" + "loss".lower())


@pytest.mark.parametrize("there", [True, False])
def test_a_switch_that_is_turned_on_later(there):
    """Also where the attribute is not there yet."""
    model, fast = pair(fork(forward_loss=l1_loss))
    if there:
        model.l1 = fast.l1 = False
        maefast.accelerate(fast)
    same(model, fast)
    assert runs(fast) == "ran fast once"
    model.l1 = fast.l1 = True
    with pytest.warns(UserWarning, match=r"MaskedAutoencoderViT\.forward runs as it was, because l1 has changed from"):
        fast(images(torch.float64))
    same(model, fast)
    assert "as it was 2 times because l1 has changed" in runs(fast)
    assert "(since call 2)" in runs(fast)
    for net in (model, fast):
        net.l1 = False
        if not there:
            del net.l1
    same(model, fast)
    assert "ran fast 2 times" in runs(fast)


def test_a_curriculum():
    kind = fork(forward_loss=by_epoch, epoch=0)
    model, fast = pair(kind)
    for epoch in range(5):
        model.epoch = fast.epoch = epoch
        same(model, fast)
    assert "epoch has changed" in runs(fast)


def test_values_inside_of_other_objects():
    """A configuration object, a dictionary, a list that grows."""
    model = build(fork(forward_loss=by_options))
    model.options, model.flags, model.steps = SimpleNamespace(l1=False), {"l1": False}, [0]
    for change in (
        lambda m: setattr(m.options, "l1", True),
        lambda m: m.flags.update(l1=True),
        lambda m: m.steps.append(5),
        lambda m: setattr(m, "options", SimpleNamespace(l1=True)),
    ):
        mine, fast = copy.deepcopy(model), maefast.accelerate(copy.deepcopy(model))
        same(mine, fast)
        assert runs(fast) == "ran fast once"
        change(mine)
        change(fast)
        same(mine, fast)
        assert "as it was once" in runs(fast)


def test_a_global_switch(monkeypatch):
    model, fast = pair(fork(forward_loss=by_global))
    same(model, fast)
    assert runs(fast) == "ran fast once"
    monkeypatch.setitem(globals(), "SWITCH", True)
    same(model, fast)
    assert "SWITCH" in runs(fast)


def test_names_made_up_while_it_runs():
    """Then every plain attribute is guarded."""
    kind = fork(forward_loss=by_computed_name, weight_of_loss=1.0)
    model, fast = pair(kind)
    model.weight_of_loss = fast.weight_of_loss = 1.0
    maefast.accelerate(fast)
    same(model, fast)
    assert runs(fast) == "ran fast once"
    model.weight_of_loss = fast.weight_of_loss = 2.0
    same(model, fast)


def counts(self, imgs, mask_ratio=0.75):
    self.calls = getattr(self, "calls", 0) + 1
    return ROOT.forward(self, imgs, mask_ratio)


def remembers(self, imgs, pred, mask):
    self.last = pred.detach()
    return ROOT.forward_loss(self, imgs, pred, mask)


def appends(self, imgs, pred, mask):
    loss = ROOT.forward_loss(self, imgs, pred, mask)
    self.history.append(loss.item())
    return loss


@pytest.mark.parametrize(("name", "method"), [("forward", counts), ("forward_loss", remembers)])
def test_what_the_original_writes_keeps_it(name, method):
    model, fast = pair(fork(**{name: method}))
    same(model, fast)
    (note,) = [note for note in maefast.report(fast).kept if note.method == name]
    assert "writes" in note.text
    assert getattr(fast, "calls", 1) == 1
    assert name == "forward" or fast.last.shape == model.last.shape


def test_what_the_original_fills_in_place_keeps_it():
    model = build(fork(forward_loss=appends))
    model.history = []
    fast = maefast.accelerate(copy.deepcopy(model))
    assert fast.history == []
    same(model, fast)
    assert len(fast.history) == 1
    assert "writes history" in str(maefast.report(fast))


def by_buffer(self, x, ids_restore):
    return ROOT.forward_decoder(self, x, ids_restore) * self.temperature


def test_a_buffer_that_nobody_knows_keeps_it():
    model = build(fork(forward_decoder=by_buffer))
    model.register_buffer("temperature", torch.ones((), dtype=torch.float64))
    fast = maefast.accelerate(copy.deepcopy(model))
    model.temperature.fill_(2)
    fast.temperature.fill_(2)
    same(model, fast)
    assert "temperature, a tensor that the accelerated code does not know" in str(maefast.report(fast))


def adds_zeros(self, imgs, pred, mask):
    return ROOT.forward_loss(self, imgs, pred + (self.extra @ self.extra.T).sum(), mask)


@pytest.mark.parametrize("verify", [True, False])
def test_a_parameter_that_nobody_knows_is_trained(verify):
    """All zero and large: outputs and gradients of the other parameters tell nothing."""
    model = build(fork(forward_loss=adds_zeros))
    model.extra = nn.Parameter(torch.zeros(400, 400, dtype=torch.float64))
    fast = maefast.accelerate(copy.deepcopy(model), verify=verify)
    same(model, fast)
    assert fast.extra.grad is not None


# --- methods and classes ------------------------------------------------------------------------------------


def absolute(self, imgs, pred, mask):
    return ((pred - self.patchify(imgs)).abs().mean(-1) * mask).sum() / mask.sum()


def test_a_method_replaced_on_the_object():
    model, fast = pair()
    for net in (model, fast):
        net.forward_loss = MethodType(absolute, net)
    same(model, fast)
    assert "as it was once because forward_loss was replaced on the object" in runs(fast)


def test_a_method_patched_on_the_class(monkeypatch):
    model, fast = pair()
    monkeypatch.setattr(ROOT, "random_masking", lambda self, x, ratio: _masking(self, x.flip(1), ratio))
    same(model, fast)
    assert "MaskedAutoencoderViT.random_masking was replaced" in runs(fast)


_masking = ROOT.random_masking


def test_layers_of_torch_patched_on_the_class(monkeypatch):
    model, fast = pair()
    for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.GELU):
        original = kind.forward
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, x, original=original: original(self, x) * 1.5)
            same(model, fast)
            assert f"torch's {kind.__name__}.forward was replaced" in runs(fast)
    same(model, fast)


class Normed(nn.Module):
    def __init__(self, embed):
        super().__init__()
        vars(self).update(vars(embed))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2) * 2


def test_another_patch_embedding():
    model, fast = pair()
    for net in (model, fast):
        net.patch_embed = Normed(net.patch_embed)
    same(model, fast)
    assert "patch_embed is another module now" in runs(fast)


def test_a_class_that_is_set_by_hand():
    class Other(ROOT):
        forward_loss = absolute

    model, fast = pair()
    model.__class__ = Other
    fast.__class__ = Other  # takes our methods away
    same(model, fast)


# --- modes and weights --------------------------------------------------------------------------------------


def masks_less_in_evaluation(self, x, mask_ratio):
    return _masking(self, x, mask_ratio if self.training else mask_ratio / 2)


@pytest.mark.parametrize("training", [True, False])
def test_a_fork_that_evaluates_differently(training):
    """Fast in the one mode that agrees, whatever the mode was while compared."""
    model = build(fork(random_masking=masks_less_in_evaluation)).train(training)
    fast = maefast.accelerate(copy.deepcopy(model))
    assert fast.training is training
    for mode in (True, False):
        model.train(mode)
        fast.train(mode)
        same(model, fast)
    assert runs(fast).startswith("ran fast once, as it was once because in evaluation it computes something else")
    assert "in evaluation it computes something else, and runs as it was" in str(maefast.report(fast))


def test_a_difference_that_only_thawed_parameters_show():
    def encoder(self, x, mask_ratio):
        frozen = self.pos_embed
        self_pos = frozen.detach()
        x = self.patch_embed(x) + self_pos[:, 1:]
        x, mask, ids = self.random_masking(x, mask_ratio)
        cls = (self.cls_token + self_pos[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids

    model, fast = pair(fork(forward_encoder=encoder))
    for net in (model, fast):
        net.pos_embed.requires_grad_(True)
    same(model, fast)
    assert "gradient of pos_embed" in str(maefast.report(fast))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_hide_everything(value):
    """Such as those before a checkpoint is loaded."""
    model = build(fork(forward_loss=absolute))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    fast = maefast.accelerate(copy.deepcopy(model))
    assert "forward_loss" in {note.method for note in maefast.report(fast).kept}
    model.load_state_dict(state)
    fast.load_state_dict(state)
    same(model, fast)


# --- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_guarded_by_what_was_compared(copied):
    """Not by what they are when they are made."""
    model, fast = pair()
    same(model, copied(fast))
    fast.norm_pix_loss = model.norm_pix_loss = False
    other = copied(fast)
    for _ in range(3):
        same(model, other)
    assert "as it was 3 times because norm_pix_loss has changed" in runs(other)
    fast.norm_pix_loss = model.norm_pix_loss = other.norm_pix_loss = True
    same(model, other)
    assert "ran fast" in runs(other)


def test_a_copy_compiles():
    """Its guards have looked at it by then."""
    torch._dynamo.reset()
    model, fast = pair()
    fast.norm_pix_loss = model.norm_pix_loss = False
    other = copy.deepcopy(fast)
    same(model, torch.compile(other, backend="aot_eager"))
    fast.norm_pix_loss = model.norm_pix_loss = True
    same(model, torch.compile(copy.deepcopy(fast), backend="aot_eager"))


def test_compiled_code_sees_switches():
    torch._dynamo.reset()
    model, fast = pair(fork(forward_loss=by_epoch, epoch=0))
    model.epoch = fast.epoch = 0
    maefast.accelerate(fast)
    compiled = torch.compile(fast, backend="aot_eager")
    for epoch in (0, 5, 0):
        model.epoch = fast.epoch = epoch
        same(model, compiled)


class Kinds:
    @classmethod
    def factor(cls):
        return 2.0

    @staticmethod
    def power(x):
        return x**2

    @property
    def half(self):
        return 0.5


def by_kinds(self, imgs, pred, mask):
    return ROOT.forward_loss(self, imgs, pred, mask) * self.power(self.factor() * self.half)


def test_class_methods_and_properties(monkeypatch):
    extras = {name: vars(Kinds)[name] for name in ("factor", "power", "half")}
    kind = fork(forward_loss=by_kinds, **extras)
    model, fast = pair(kind)
    same(model, fast)
    fast.something = model.something = 1  # makes the guards look closely
    same(model, fast)
    assert runs(fast) == "ran fast 2 times"
    for name, value in (("factor", classmethod(lambda cls: 4.0)), ("half", property(lambda self: 3.0))):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, value)
            same(model, fast)
            assert f"{name} was replaced" in runs(fast)
    same(model, fast)


def test_nothing_is_kept_alive():
    """No cycle: a deleted model frees its memory at once."""
    import gc
    import weakref

    model = maefast.accelerate(build())
    model(images(torch.float64))
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


# --- cost and code ------------------------------------------------------------------------------------------


def lines(function, *args):
    """The lines of Python that a call runs, itself and what it calls. Times would be the machine's as much as ours."""
    ran = []

    def trace(frame, event, _):
        if event == "line":
            ran.append((frame.f_code.co_name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return ran


@pytest.mark.parametrize("family", [test_mae.TestMAE, test_hf_vitmae.TestViTMAE, test_hf_videomae.TestVideoMAE])
def test_guards_are_cheap(family):
    """Two lines for each thing that is compared, and no long look: 0.7 to 5 µs on AMD EPYCs."""
    fast = family().accelerate(family().build())
    for module in fast.modules():
        for name, guards in _swap.setting(module, _swap.GUARDS, {}).items():
            assert guards.failing(module) is None
            ran = lines(guards.failing, module)
            assert not [where for where in ran if where[0] == "_examine"], f"{type(module).__name__}.{name}"
            assert len(ran) <= 60, f"{type(module).__name__}.{name}: {len(ran)} lines"


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.a = self.b = self.c = 1

    def forward(self, x):
        return self.inner(x) * self.a + self.helper(x) + getattr(self, "d", 0)

    def helper(self, x):
        return sum([x * self.b for _ in range(2)])


def test_what_code_reads():
    (site, *_) = Guards(Reads(), ("forward",), {"inner"}).sites
    assert {"a", "b", "d"} <= set(site.values)
    assert "c" not in site.values
    assert set(site.functions) == {"forward", "helper"}
    assert not site.children
    inner = Guards(Reads(), ("forward",)).sites[1]
    assert inner.path == "inner"
    assert set(inner.values) >= {"in_features", "out_features"}


def writes_self(self):
    self.x = 1


def writes_inside(self):
    self.part.x = 1


def writes_a_result(self):
    out = SimpleNamespace()
    out.x = 1


def makes_up_names(self, name):
    return getattr(self, name)


def constant_name(self):
    return getattr(self, "name", None)


def hands_itself_on(self):
    return makes_up_names(self, "x")


def test_looks():
    look = {f.__name__: _code.look(f.__code__) for f in (writes_self, writes_inside, writes_a_result)}
    assert [bool(found.writes) for found in look.values()] == [True, True, False]
    assert _code.look(makes_up_names.__code__).computed
    assert not _code.look(constant_name.__code__).computed
    assert "name" in _code.look(constant_name.__code__).names
    assert _code.look(hands_itself_on.__code__).handed
    assert not _code.look(writes_self.__code__).handed


def test_code_that_cannot_be_looked_into():
    class Odd(nn.Module):
        forward = torch.relu

    with pytest.raises(Unguarded, match="no plain function"):
        Guards(Odd(), ("forward",))
