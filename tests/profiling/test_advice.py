"""What is said of shares, and that only options that exist are named."""

from __future__ import annotations

import inspect

import pytest

import maefast
from maefast import cli
from maefast.profiling.advice import Facts, advise

SHARES = {"data": 0.0, "launch": 0.1, "products": 0.1, "memory": 0.1, "elsewhere": 0.0}


def said(device="cpu", cpus=8, **facts):
    shares = {**SHARES, **{name: facts.pop(name) for name in SHARES if name in facts}}
    return advise(Facts(device=device, cpus=cpus, **shares, **facts))


@pytest.mark.parametrize(
    ("facts", "kind", "option"),
    [
        ({"data": 0.5, "command": True, "workers": 2}, "data-bound", "--workers"),
        ({"data": 0.5}, "data-bound", "num_workers"),
        ({"data": 0.9, "command": True, "workers": 6}, "data-bound", "--cache-mb"),
        ({"launch": 0.7, "command": True}, "launch-bound", "--batch-size"),
        ({"launch": 0.7}, "launch-bound", None),
        ({"launch": 0.7, "replaceable": True}, "launch-bound", "maefast.accelerate"),
        ({"launch": 0.7, "device": "cuda", "command": True}, "launch-bound", "--graph"),
        ({"launch": 0.7, "device": "cuda"}, "launch-bound", "maefast.graphed_step"),
        ({"products": 0.7, "bfloat16": True, "command": True}, "GEMM-bound", "--amp"),
        ({"products": 0.7, "bfloat16": True}, "GEMM-bound", "torch.autocast"),
        ({"products": 0.7, "bfloat16": True, "dtype": "bfloat16"}, "GEMM-bound", None),
        ({"products": 0.7, "dtype": "bfloat16", "command": True}, "GEMM-bound", "--amp"),
        ({"products": 0.7, "dtype": "bfloat16"}, "GEMM-bound", None),
        ({"products": 0.7, "dtype": "bfloat16", "device": "cuda", "bfloat16": True}, "GEMM-bound", None),
        ({"products": 0.7, "replaceable": True}, "GEMM-bound", "maefast.accelerate"),
        ({"products": 0.7, "idle_cpus": 3}, "GEMM-bound", "OMP_NUM_THREADS"),
        ({"memory": 0.7, "largest": "optimizer", "command": True}, "memory-bound", "--optim-state"),
        ({"memory": 0.7, "largest": "optimizer"}, "memory-bound", "maefast.optim.AdamW"),
        ({"memory": 0.7, "largest": "optimizer", "narrow": True, "command": True}, "memory-bound", "--batch-size"),
        ({"memory": 0.7, "replaceable": True}, "memory-bound", "maefast.accelerate"),
        ({"memory": 0.7}, "memory-bound", None),
        ({"elsewhere": 0.7, "culprit": "sleep"}, "host-bound", None),
    ],
)
def test_what_bounds_a_step_and_what_helps(facts, kind, option):
    advice = said(**facts)
    assert advice.kind == kind
    assert advice.option == option
    assert advice.sentence.lower().startswith(f"{kind.lower()}: ")
    assert advice.sentence.endswith(".")
    if option is not None:
        assert option in advice.sentence
        assert exists(option)
    assert "--" not in advice.sentence or facts.get("command")


def exists(option: str) -> bool:
    if option.startswith("--"):
        return option.removeprefix("--").replace("-", "_") in inspect.signature(cli.pretrain).parameters
    if option.startswith("maefast."):
        found = maefast
        for name in option.split(".")[1:]:
            found = getattr(found, name)
        return callable(found)
    return option in ("num_workers", "torch.autocast", "OMP_NUM_THREADS")


@pytest.mark.parametrize(("share", "workers", "needed"), [(0.5, 0, 2), (0.5, 2, 4), (0.75, 1, 4), (0.2, 3, 4)])
def test_how_many_workers_would_keep_up(share, workers, needed):
    assert f"--workers {needed} would keep up" in said(data=share, workers=workers, command=True, cpus=16).sentence


def test_waiting_for_data_comes_first():
    assert said(data=0.25, products=0.65).kind == "data-bound"
    assert said(data=0.15, products=0.65).kind == "GEMM-bound"


def test_waits_of_the_host_are_told():
    assert "the host waits for it 3 times" in said(launch=0.6, device="cuda", waits=3).sentence
