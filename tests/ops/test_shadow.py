"""16-bit copies of weights: found while they hold, and never once anything has written to the weight."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn

from maefast.optim import AdamW, shadow_of

HALF = torch.bfloat16


@pytest.fixture
def trained():
    """A layer of 4 x 4 and its optimizer after a step."""
    layer = nn.Linear(4, 4)
    optimizer = AdamW(layer.parameters(), lr=0.1, shadow=HALF)
    step(layer, optimizer)
    assert holds(layer.weight)
    assert holds(layer.bias)
    return layer, optimizer


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.randn(3, 4).to(next(layer.parameters()))).square().sum().backward()
    optimizer.step()


def holds(param):
    """Whether there is a copy; it must be right."""
    found = shadow_of(param, HALF)
    assert found is None or torch.equal(found, param.to(HALF)), "a stale copy is in use"
    return found is not None


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def of_a_view(layer):
    with torch.no_grad():
        layer.weight[1:].t().add_(1)


def of_data(layer):
    layer.weight.data.add_(1)


def of_a_view_of_data(layer):
    layer.weight.data[2].fill_(3)


def average_copied_back(layer):
    average = [torch.randn_like(p) for p in layer.parameters()]
    torch._foreach_copy_([p.data for p in layer.parameters()], average)


def average_of_torch(layer):
    average = torch.optim.swa_utils.AveragedModel(layer)
    nn.init.ones_(average.module.weight)
    for own, other in zip(layer.parameters(), average.parameters()):
        own.data.copy_(other.data)


def new_data(layer):
    layer.weight.data = torch.randn(4, 4)


def transposed_data(layer):
    layer.weight.data = layer.weight.data.t()


def data_there_and_back(layer):
    kept = layer.weight.data
    layer.weight.data = torch.zeros(4, 4)
    kept.add_(1)
    layer.weight.data = kept


def of_detached(layer):
    layer.weight.detach().add_(1)


def of_state_dict(layer):
    layer.state_dict()["weight"].zero_()


def load(layer):
    layer.load_state_dict(nn.Linear(4, 4).state_dict())


def load_assigned(layer):
    layer.load_state_dict(nn.Linear(4, 4).state_dict(), assign=True)


def vector(layer):
    nn.utils.vector_to_parameters(torch.randn(20), layer.parameters())


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(4, 4)))


def initialised(layer):
    nn.init.xavier_uniform_(layer.weight)


def moved_and_back(layer):
    layer.to(torch.float64)
    layer.to(torch.float32)
    layer.weight.data.add_(1)


def set_to(layer):
    with torch.no_grad():
        layer.weight.set_(torch.randn(4, 4))


def turned(layer):
    with torch.no_grad():
        layer.weight.t_()


def other_optimizer(layer):
    layer(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


def other_fused_optimizer(layer):
    """Raises no version."""
    layer(torch.randn(2, 4)).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True).step()


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.add_(1)


def many_at_once(layer):
    with torch.no_grad():
        torch._foreach_mul_(list(layer.parameters()), 2)


def another_parameter(layer):
    with torch.no_grad():
        nn.Parameter(layer.weight).add_(1)


def bits(layer):
    with torch.no_grad():
        layer.weight.view(torch.int32).add_(2**20)


def compiled(layer):
    @torch.compile(backend="aot_eager")
    def change(weight):
        with torch.no_grad():
            weight.mul_(2)

    change(layer.weight)


def compiled_data(layer):
    torch.compile(lambda weight: weight.data.mul_(2), backend="aot_eager")(layer.weight)


def other_adamw(layer):
    layer(torch.randn(2, 4)).sum().backward()
    AdamW(layer.parameters(), lr=1.0).step()


CHANGES = [
    in_place,
    of_a_view,
    of_data,
    of_a_view_of_data,
    average_copied_back,
    average_of_torch,
    new_data,
    transposed_data,
    data_there_and_back,
    of_detached,
    of_state_dict,
    load,
    load_assigned,
    vector,
    swapped,
    initialised,
    moved_and_back,
    set_to,
    turned,
    other_optimizer,
    other_fused_optimizer,
    other_adamw,
    in_inference_mode,
    many_at_once,
    another_parameter,
    bits,
    compiled,
    compiled_data,
]


VIEWS = (vector,)  # every weight is then a part of one vector, and never has a copy
TURNED = (transposed_data, turned)  # another order in memory: the next step makes another copy


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_has_no_copy(trained, change):
    layer, optimizer = trained
    change(layer)
    assert not holds(layer.weight)
    step(layer, optimizer)
    assert holds(layer.weight) == (change not in (*VIEWS, load_assigned))  # assign=True puts in another parameter


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_refreshed_copies_hold(trained, change):
    layer, optimizer = trained
    change(layer)
    optimizer.refresh_shadows()
    assert holds(layer.weight) == (change not in (*VIEWS, *TURNED, load_assigned))


def test_refreshing_unseen_changes(trained):
    layer, optimizer = trained
    layer.weight.detach().numpy()[:] = 3
    optimizer.refresh_shadows(every=True)
    assert holds(layer.weight)


@pytest.mark.parametrize("when", ["before the optimizer", "before the step", "after the step"])
def test_an_alias_that_is_kept(when):
    """`p.data` taken once and written to for ever after: autograd counts none of it."""
    layer = nn.Linear(4, 4)
    alias = layer.weight.data if when == "before the optimizer" else None
    optimizer = AdamW(layer.parameters(), shadow=HALF)
    alias = layer.weight.data if when == "before the step" else alias
    step(layer, optimizer)
    alias = layer.weight.data if when == "after the step" else alias
    for _ in range(3):
        alias.add_(1)
        assert not holds(layer.weight)
        assert holds(layer.bias)
        step(layer, optimizer)
        assert not holds(layer.weight)
    del alias
    step(layer, optimizer)
    assert holds(layer.weight)


def test_what_only_reads_keeps_the_copy(trained):
    layer, optimizer = trained
    x = torch.randn(2, 4)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False).requires_grad_(True)
    layer.eval().train()
    torch.save(layer.state_dict(), io.BytesIO())
    copy.deepcopy(optimizer.state_dict())
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.zero_grad()
    assert holds(layer.weight)


def test_a_copied_model_has_none(trained):
    layer, _ = trained
    other = copy.deepcopy(layer)
    assert not holds(other.weight)
    step(layer, trained[1])
    assert holds(layer.weight)
    saved = io.BytesIO()
    torch.save(layer, saved)
    assert not any(b"hadow" in line for line in saved.getvalue().split(b"\n"))


def test_a_weight_without_gradient_keeps_its_copy(trained):
    layer, optimizer = trained
    optimizer.zero_grad()
    layer.bias.grad = torch.ones(4)
    optimizer.step()
    assert holds(layer.weight)
    assert holds(layer.bias)


def test_a_step_that_is_left_out_leaves_a_right_copy():
    layer = nn.Linear(4, 4)
    optimizer = AdamW(layer.parameters(), shadow=HALF)
    optimizer.found_inf = torch.tensor(1.0)
    before = layer.weight.detach().clone()
    step(layer, optimizer)
    assert torch.equal(layer.weight, before)
    assert holds(layer.weight)
    layer.weight.data.add_(1)
    step(layer, optimizer)
    assert holds(layer.weight)


def test_which_weights_have_one():
    wide, double, half = (nn.Parameter(torch.randn(3, 3, dtype=d)) for d in (torch.float32, torch.float64, HALF))
    plain = torch.randn(3, requires_grad=True)  # its `.data` cannot be watched
    optimizer = AdamW([wide, double, half, plain], shadow=HALF)
    for param in (wide, double, half, plain):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [holds(p) for p in (wide, double, half, plain)] == [True, True, False, False]
    assert shadow_of(wide, torch.float16) is None
    assert shadow_of(nn.Parameter(torch.ones(2)), HALF) is None
    assert shadow_of(torch.ones(2), HALF) is None


def test_channels_last_weights():
    layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    optimizer = AdamW(layer.parameters(), shadow=HALF)
    layer(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert holds(layer.weight)
    assert shadow_of(layer.weight, HALF).stride() == layer.weight.stride()


def test_copies_go_with_their_optimizer():
    layer = nn.Linear(4, 4)
    optimizer = AdamW(layer.parameters(), shadow=HALF)
    step(layer, optimizer)
    assert holds(layer.weight)
    del optimizer
    gc.collect()
    assert not holds(layer.weight)


def test_a_step_between_forward_and_backward_is_seen(trained):
    """The copy is an operand of the graph: autograd refuses a backward through one that was written again."""
    layer, optimizer = trained
    out = (shadow_of(layer.weight, HALF) * torch.ones(4, 4, dtype=HALF, requires_grad=True)).sum()
    step(layer, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_compiled_code_casts(trained):
    layer, _ = trained
    seen = []

    def call(x):
        seen.append(shadow_of(layer.weight, HALF) is None)
        return x + 1

    torch.compile(call, backend="eager")(torch.ones(2))
    assert seen == [True] or seen == []


def test_data_of_parameters_is_as_before(trained):
    """The watch changes nothing that a user sees."""
    layer, _ = trained
    assert type(layer.weight) is nn.Parameter
    data = layer.weight.data
    assert type(data) is torch.Tensor
    assert not data.requires_grad
    assert data.data_ptr() == layer.weight.data_ptr()
    with pytest.raises(TypeError, match="data has to be a tensor"):
        layer.weight.data = 3
    whole = torch.compile(lambda p: (p.data * 2).sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(layer.weight), (layer.weight.detach() * 2).sum())
