"""Stages of recordings that are made up here, where every nanosecond is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maefast.profiling.attribution import LONG, TINY, account, grouped, memory, middle
from maefast.profiling.calls import FREE, OP, PYTHON, C, Call, Memory, _text, fitted, of, read, recorded, self_times
from maefast.profiling.places import Places


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(1, 1)])
        self.decoder = nn.Linear(1, 1)


MODEL = Model()
PLACES = Places(MODEL)
US = 1000


def op(name, start, end, *calls, **more):
    return Call(OP, name, start * US, end * US, calls=list(calls), **more)


def python(start, end, *calls, file="user.py", function="f", module=None, name="f"):
    mine = None if module is None else id(module)
    return Call(
        PYTHON, name, start * US, end * US, file=file, function=function, module=mine, calls=list(calls)
    )  # fmt: skip


def step():
    """1 ms: the encoder's product of 300 us, the decoder's of 100 us, walking back 400 us, and Python."""
    forward = python(0, 500,
        python(10, 330, op("aten::addmm", 20, 320, sequence=1), module=MODEL.encoder[0], name="Linear"),
        python(340, 450, op("aten::addmm", 345, 445, sequence=2), module=MODEL.decoder, name="Linear"),
    )  # fmt: skip
    back = python(500, 990,
        op("autograd::engine::evaluate_function: AddmmBackward0", 510, 620,
           op("AddmmBackward0", 512, 618, op("aten::mm", 515, 615), sequence=2, backward=True)),
        op("autograd::engine::evaluate_function: AddmmBackward0", 630, 940,
           op("AddmmBackward0", 632, 938, op("aten::mm", 635, 935), sequence=1, backward=True)),
        op("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 950, 952),
        file="torch/_tensor.py", function="backward",
    )  # fmt: skip
    return python(0, 1000, forward, back, function="step")


def test_every_nanosecond_is_in_one_stage():
    found = account([step()], PLACES, FREE)
    assert found.total == 1000 * US
    assert found.python == pytest.approx((1000 - 800) * US)


def test_the_backward_belongs_to_the_stage_of_the_forward():
    stages = account([step()], PLACES, FREE).stages
    encoder, decoder = stages["encoder linear"], stages["decoder linear"]
    assert (encoder.forward, encoder.backward) == (300 * US, 300 * US)
    assert (decoder.forward, decoder.backward) == (100 * US, 100 * US)
    assert encoder.python == 20 * US + 10 * US  # of the module's call and the two nodes around the product
    assert encoder.calls == decoder.calls == 1
    assert stages["autograd"].forward == stages["autograd"].backward == 0
    assert stages["autograd"].python == (490 - 110 - 310) * US


def test_a_real_recording_adds_up():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        with torch.profiler.record_function("a range, which is no call"):
            model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    roots = of(read(recorded(lambda: [step() for _ in range(3)])), step)
    assert len(roots) == 3
    for root in roots:
        found = account([root], Places(model), FREE)
        assert found.total == pytest.approx(root.end - root.start, rel=1e-6)
        assert found.stages["linear"].backward > 0
        assert found.stages["norms"].backward > 0
        assert found.stages["optimizer"].python > 0


def test_a_name_that_is_gone():
    class Gone:
        @property
        def name(self):
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    assert _text(Gone(), "name") == ""
    assert _text(nn.Linear, "__name__") == "Linear"


def test_products_small_ops_and_other_code():
    root = python(0, 1000,
        op("aten::mm", 0, 100, dtype=torch.bfloat16),
        op("aten::add", 100, 300),
        op("aten::view", 300, 300 + TINY // US - 1),
        Call(C, "<built-in function sleep>", 400 * US, 600 * US + LONG),
        Call(C, "<built-in function len>", 700 * US, 701 * US),
    )  # fmt: skip
    found = account([root], PLACES, FREE)
    groups = grouped(found, 1.0, small=True)
    assert dict(groups.products) == {"bfloat16": 100 * US}
    assert groups.tiny == (TINY // US - 1) * US
    assert dict(groups.moving) == {"other": 200 * US}
    assert grouped(found, 0.01, small=True).tiny == pytest.approx(0.01 * (300 + TINY // US - 1) * US)
    assert grouped(found, 1.0, small=False).tiny == 0
    assert dict(found.elsewhere) == {"<built-in function sleep>": 200 * US + LONG}
    assert found.ops == 3
    assert found.total == 1000 * US


def test_what_recording_takes_is_taken_off():
    inner = Call(OP, "aten::add", 10, 30)
    outer = Call(PYTHON, "f", 0, 100, calls=[inner])
    cost = {PYTHON: 20.0, C: 0.0, OP: 8.0}
    assert self_times(inner, cost) == 20 - 4
    assert self_times(outer, cost) == 100 - 20 - 4 - 10
    assert self_times(inner, {**cost, OP: 100.0}) == 0.0


def test_what_recording_takes_is_fitted_to_the_step():
    root = python(0, 100, *(op("aten::add", at, at + 1) for at in range(0, 100, 2)))
    cost = {PYTHON: 0.0, C: 0.0, OP: 200.0}  # 51 calls, of which 50 took 0.2 us or more: 10 us
    assert fitted(root, cost, 95 * US) is cost  # not all of it
    twice = fitted(root, cost, 80 * US)
    assert twice[OP] == pytest.approx(400, rel=1e-3)
    assert account([root], PLACES, twice).total == pytest.approx(80 * US, rel=1e-3)
    assert fitted(root, cost, 10 * US) is cost  # it was something else


def test_what_disturbs_one_of_several_steps_is_left_out():
    several = [account([step()], PLACES, FREE) for _ in range(3)]
    several[0].of("loss").forward = 50.0
    several[1].of("encoder linear").forward += 4000 * US
    stages, typical = middle(several)
    assert stages["encoder linear"].forward == 300 * US
    assert stages["encoder linear"].calls == 1
    assert stages["loss"].total == 0
    assert sum(stage.total for stage in stages.values()) == 1000 * US
    assert typical is several[2]


def test_on_a_device_the_times_are_those_of_the_kernels():
    root = step()
    product = root.calls[0].calls[0].calls[0]
    product.correlation = 7
    kernels = {7: [("gemm", 40), ("Memcpy HtoD (Pinned -> Device)", 5)], 8: [("unknown", 1)]}
    found = account([root], PLACES, FREE, kernels)
    assert found.stages["encoder linear"].forward == 40
    assert found.stages["host to device"].forward == 5
    assert found.total == 45
    assert found.ops == 2


def test_memory_that_is_kept_for_the_backward():
    root = step()
    encoder, decoder = root.calls[0].calls
    encoder.calls[0].memory = [Memory(30 * US, 1, 1000, "cpu"), Memory(31 * US, 2, 500, "cpu")]
    encoder.memory = [Memory(325 * US, 2, -500, "cpu")]
    decoder.calls[0].memory = [Memory(350 * US, 3, 200, "cpu"), Memory(351 * US, 4, 9999, "cuda")]
    root.calls[1].calls[1].memory = [Memory(700 * US, 5, 700, "cpu"), Memory(800 * US, 1, -1000, "cpu")]
    found = memory(account([root], PLACES, FREE), "cpu")
    assert found.kept == {"encoder linear": 1000, "decoder linear": 200}
    assert (found.peak, found.stage) == (1900, "encoder linear")


def test_without_a_backward_what_is_left_at_the_end_is_kept():
    root = python(0, 10, op("aten::add", 1, 2))
    root.calls[0].memory = [Memory(1500, 1, 64, "cpu")]
    found = memory(account([root], PLACES, FREE), "cpu")
    assert (found.peak, found.kept) == (64, {"other": 64})
