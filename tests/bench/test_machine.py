"""What the machine is found to do, and the limits that follow."""

from __future__ import annotations

import pytest
import torch

from maefast.bench import environment, machine, timing


def test_the_limit_is_the_slower_of_the_two():
    found = {"copy_gb_s": 10.0, "matrix_tflops": {"float32": 1.0}}
    assert machine.limit(found, "float32", 10**10, None) == (1.0, "memory")
    assert machine.limit(found, "float32", 10**10, 2 * 10**12) == (2.0, "matrix")
    assert machine.limit(found, "float32", 3 * 10**10, 2 * 10**12) == (3.0, "memory")
    assert machine.limit(found, "bfloat16", None, 10**12) == (None, None)  # its rate is not known
    assert machine.limit(found, "float32", None, None) == (None, None)
    assert machine.limit(machine.UNKNOWN, "float32", 10**10, 10**12) == (None, None)
    assert machine.limit(None, "float32", 10**10, 10**12) == (None, None)


def test_measure(monkeypatch):
    monkeypatch.setitem(machine.SIDE, "cpu", 64)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 5e9)
    found = machine.measure("cpu")
    assert found["copy_gb_s"] == 5.0
    assert found["matrix_tflops"].keys() == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in found["matrix_tflops"].values())
    assert found["condition"]["load"] >= 0


def test_peak_is_what_a_call_holds_at_once():
    kib = 256 * torch.float32.itemsize

    def call():
        a = torch.zeros(256)  # 1 KiB
        b = torch.zeros(2, 256)  # with it, 3
        del a
        return b.sum() + torch.zeros(256).sum()

    assert 3 * kib <= machine.peak_bytes(call, "cpu") < 3 * kib + 512
    big = torch.zeros(10**6)
    assert machine.peak_bytes(lambda: big.add_(1), "cpu") < kib  # what was there before does not count


def test_headline_names_the_machine_and_says_when_it_is_busy(monkeypatch):
    monkeypatch.setattr(machine, "condition", lambda device: {"load": 0.1})
    line = machine.headline("cpu")
    assert environment.cpu_model() in line
    assert torch.__version__ in line
    assert "BUSY" not in line
    monkeypatch.setattr(machine, "condition", lambda device: {"load": 1.5})
    assert "BUSY: a load of 1.5" in machine.headline("cpu")


def test_slug():
    assert environment.slug("AMD EPYC (family 25, model 1), 2 cores") == "amd-epyc-family-25-model-1-2-cores"
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setitem(machine.SIDE, "cuda", 512)
    found = machine.measure("cuda")
    assert found["copy_gb_s"] > 0
    assert machine.peak_bytes(lambda: torch.zeros(2**20, device="cuda"), "cuda") == 2**22
