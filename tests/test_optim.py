"""maefast.optim.AdamW against torch's: results, checkpoints, scaled gradients, what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import maefast
from maefast.optim import AdamW, shadow_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = [(3, 5), (7,), (), (0,), (40, 33), (2, 3, 4, 4)]


def parameters(dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def train(optimizer, first, last, *, absent=False):
    """Steps first … last with gradients that depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        for i, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            grad = torch.randn(param.shape, generator=generator).to(param)
            param.grad = None if absent and (step + i) % 3 == 0 else grad
        optimizer.step()


def assert_same(ours, theirs):
    mine, others = ([p for group in o.param_groups for p in group["params"]] for o in (ours, theirs))
    for a, b in zip(mine, others, strict=True):
        bound = TOLERANCE[a.dtype]
        torch.testing.assert_close(a, b.to(a.device), rtol=bound, atol=bound)
        assert ours.state[a].keys() == theirs.state[b].keys()
        for name, value in ours.state[a].items():
            other = theirs.state[b][name].to(value.device)
            assert value.shape == other.shape
            torch.testing.assert_close(value, other, rtol=bound, atol=bound)


OPTIONS = [
    {},
    {"lr": 0.3, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.3},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(0.02, dtype=torch.float64), "betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch(dtype, form, options):
    if dtype is torch.bfloat16 and form != {"fused": True}:
        pytest.skip("the other forms round every intermediate result to 16 bits")
    if "lr" in options and isinstance(options["lr"], torch.Tensor) and form == {"foreach": True}:
        pytest.skip("torch's foreach form takes no tensor here")
    ours = AdamW(parameters(dtype), **options)
    theirs = torch.optim.AdamW(parameters(dtype), **options, **form)
    for optimizer in (ours, theirs):
        train(optimizer, 0, 12, absent=True)
    assert_same(ours, theirs)


def test_groups_and_schedule():
    def run(make):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.1, "weight_decay": 0.5}, {"params": params[2:], "betas": (0.8, 0.9)}]
        optimizer = make(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            train(optimizer, step, step + 1)
            schedule.step()
        return optimizer

    assert_same(run(AdamW), run(torch.optim.AdamW))


def test_closure_is_run_with_gradients():
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 9.0
    assert losses[-1] < 4.0


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_checkpoints_are_torchs(form, amsgrad):
    """A run of one goes on in the other, and back, as if nothing had happened."""
    whole = torch.optim.AdamW(parameters(), amsgrad=amsgrad, **form)
    train(whole, 0, 15)

    def saved(optimizer):
        file = io.BytesIO()
        params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        torch.save((params, optimizer.state_dict()), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    optimizer = torch.optim.AdamW(parameters(), amsgrad=amsgrad, **form)
    for first, make in ((0, None), (5, AdamW), (10, torch.optim.AdamW)):
        if make is not None:
            params, state = saved(optimizer)
            keys = {index: set(slots) for index, slots in state["state"].items()}
            optimizer = (
                make([nn.Parameter(p) for p in params], lr=7.0, shadow=torch.bfloat16)
                if make is AdamW
                else (make([nn.Parameter(p) for p in params], lr=7.0))
            )
            optimizer.load_state_dict(state)
            again = optimizer.state_dict()
            assert {index: set(slots) for index, slots in again["state"].items()} == keys
            assert again["param_groups"][0].keys() == state["param_groups"][0].keys()
        train(optimizer, first, first + 5)
    assert_same(optimizer, whole)


def test_old_checkpoints_count_steps_in_numbers():
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, 0, 2)
    state = optimizer.state_dict()
    for slots in state["state"].values():
        slots["step"] = 2
    optimizer.load_state_dict(state)
    train(optimizer, 2, 3)
    assert all(float(optimizer.state[p]["step"]) == 3 and optimizer.state[p]["step"].shape == () for p in params)


@pytest.mark.parametrize("clip", [False, True])
def test_scaled_gradients(clip):
    """GradScaler on a CPU, with a step in which a gradient overflows: as torch's fused form, gradients included."""

    def run(make):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = make(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            x = torch.full((2, 4), float("inf") if step == 2 else 1.0 + step)
            scaler.scale(layer(x).square().mean()).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            if step != 2:
                seen += [p.grad.clone() for p in layer.parameters()]
        return optimizer, seen, scaler.get_scale()

    ours, theirs = run(AdamW), run(lambda params, lr: torch.optim.AdamW(params, lr, fused=True))
    assert_same(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert ours[2] == theirs[2]
    assert {float(slots["step"]) for slots in ours[0].state.values()} == {5.0}


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch ties a gradient's dtype to its tensor's"
)
def test_gradients_of_16_bits():
    params, others = parameters(), parameters()
    ours, theirs = AdamW(params), torch.optim.AdamW(others)
    for step in range(4):
        for i, (param, other) in enumerate(zip(params, others)):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i)).bfloat16()
            param.grad_dtype = torch.bfloat16
            param.grad, other.grad = grad, grad.float()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_copies_and_files_of_an_optimizer():
    optimizer = AdamW(parameters(), lr=0.1, shadow=torch.bfloat16)
    train(optimizer, 0, 3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.shadow is torch.bfloat16
        assert other._step_supports_amp_scaling
        assert all(shadow_of(p, torch.bfloat16) is None for p in other.param_groups[0]["params"])
        train(other, 3, 5)
        assert all(shadow_of(p, torch.bfloat16) is not None for p in other.param_groups[0]["params"])
    train(optimizer, 3, 5)
    assert_same(optimizer, other)
    assert "shadow" not in optimizer.state_dict()["param_groups"][0]


def test_a_model_cast_with_its_state():
    """To 16 bits, where no copy is needed, and back."""
    layer = nn.Linear(4, 4)
    optimizer = AdamW(layer.parameters(), shadow=torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float32):
        layer.to(dtype)
        optimizer.load_state_dict(optimizer.state_dict())  # casts the state, as torch's does
        train(optimizer, 0, 2)
        found = shadow_of(layer.weight, torch.bfloat16)
        assert (found is not None) == (dtype is torch.float32)
        assert found is None or torch.equal(found, layer.weight.bfloat16())


W = nn.Parameter(torch.zeros(2, 2))
REFUSED = [
    ({"foreach": True}, ValueError, "foreach=True"),
    ({"fused": False}, ValueError, "fused=False"),
    ({"differentiable": True}, ValueError, "differentiable=True"),
    ({"shadow": torch.float32}, ValueError, "shadow must be"),
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, ValueError, "lr must hold one number"),
    ({"eps": -1e-8}, ValueError, "Invalid epsilon value"),
    ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value"),
    ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1"),
    ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
    ({"betas": 0.9}, ValueError, "betas must be two numbers"),
    ({"betas": (0.9, None)}, TypeError, r"betas\[1\] must be a number"),
    ({"lr": "fast"}, TypeError, "lr must be a number"),
    ({"eps": None}, TypeError, "eps must be a number"),
    ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}, TypeError, "complex64"),
    ({"params": []}, ValueError, "empty parameter list"),
    ({"params": [{"params": [W], "lr": -2.0}]}, ValueError, "Invalid learning rate: -2.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        AdamW(**{"params": [W], **options})


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice():
    with pytest.raises(ValueError, match="twice"):
        AdamW([W, W])
    optimizer = AdamW([W])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [W]})
    with pytest.raises(ValueError, match="epsilon"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t[:1]], ids=["dtype", "shape"])
def test_a_model_that_changed_under_its_state(change):
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = AdamW([weight])
    train(optimizer, 0, 1)
    weight.grad = None
    weight.data = change(weight.data)
    with pytest.raises(ValueError, match="its state was made for"):
        train(optimizer, 1, 2)


@pytest.mark.parametrize("shadow", [None, torch.bfloat16])
def test_inside_compiled_code(shadow):
    """The step runs as it is: a break in the graph."""

    def run(compiled):
        layer = nn.Linear(4, 4)
        nn.init.constant_(layer.weight, 0.5)
        nn.init.zeros_(layer.bias)
        optimizer = AdamW(layer.parameters(), lr=0.1, shadow=shadow)

        def step():
            optimizer.zero_grad()
            layer(torch.arange(8.0).view(2, 4)).square().sum().backward()
            optimizer.step()

        step = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            step()
        assert (shadow_of(layer.weight, torch.bfloat16) is not None) == (shadow is not None)
        return optimizer

    assert_same(run(True), run(False))


def test_tensor_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="plain dense tensors, not"):
        AdamW([nn.Parameter(TwoTensor(torch.zeros(2), torch.zeros(2)))])


def test_an_option_of_one_group_may_be_a_tensor():
    """Tensors are read when a step is made, as torch reads them."""
    lr, beta = torch.tensor(0.1), torch.tensor(0.5)
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [weight], "lr": lr, "betas": (beta, beta)}], weight_decay=0.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    lr.fill_(0.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_ops_backend_is_obeyed():
    params = parameters()
    optimizer = AdamW(params)
    with maefast.backend("cuda"), pytest.raises(RuntimeError, match="adamw cannot use it"):
        train(optimizer, 0, 1)
    with maefast.backend("reference"):
        train(optimizer, 0, 1)


# --- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
def test_gpu_equals_torch_and_never_waits(options):
    ours = AdamW(parameters(device="cuda"), lr=torch.tensor(0.01, device="cuda"), shadow=torch.bfloat16, **options)
    theirs = torch.optim.AdamW(parameters(device="cuda"), lr=0.01, fused=True, **options)
    train(theirs, 0, 8, absent=True)
    train(ours, 0, 4, absent=True)
    mode = torch.cuda.get_sync_debug_mode()
    params = ours.param_groups[0]["params"]
    for param in params:
        param.grad = torch.zeros_like(param)
    keep = copy.deepcopy((params, ours.state_dict()))
    try:
        torch.cuda.set_sync_debug_mode("error")
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with torch.no_grad():
        for param, before in zip(params, keep[0]):
            param.copy_(before)
    ours.load_state_dict(keep[1])
    train(ours, 4, 8, absent=True)
    assert_same(ours, theirs)


@pytest.mark.gpu
def test_gpu_and_cpu_in_one_group():
    def run(make):
        params = [p for pair in zip(parameters(), parameters(device="cuda")) for p in pair]
        optimizer = make(params, lr=0.1)
        train(optimizer, 0, 3)
        return optimizer

    assert_same(run(AdamW), run(torch.optim.AdamW))


@pytest.mark.gpu
def test_gpu_graph_replays_equal_steps():
    """The step captured once, with the learning rate in a tensor that changes between replays, and copies refreshed."""
    lr = torch.tensor(0.1, device="cuda")
    ours, eager = (AdamW(parameters(device="cuda"), lr=lr, shadow=torch.bfloat16) for _ in range(2))
    params = ours.param_groups[0]["params"]
    for param in params:
        param.grad = torch.ones_like(param)
    for param in eager.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for rate in (0.05, 0.2, 0.0):
        lr.fill_(rate)
        ours.refresh_shadows()
        graph.replay()
        eager.step()
    assert_same(ours, eager)
    for param in params:
        torch.testing.assert_close(ours._shadows[param].copy, param.bfloat16(), rtol=0, atol=0)
