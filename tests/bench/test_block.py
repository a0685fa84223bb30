"""maefast.bench.block measures what it says."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from maefast.bench import block


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measure(dtype):
    threads = torch.get_num_threads()
    records = block.measure(32, 2, 2, 5, 2, dtype, threads=1, rounds=2)
    assert torch.get_num_threads() == threads
    ours, eager = records
    assert (ours["peer"], eager["peer"], eager["time_to_eager"]) == ("maefast", "eager", 1.0)
    assert 0 < ours["best_s"] <= ours["median_s"]
    assert 0 < ours["kept_bytes"] < eager["kept_bytes"]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(block, "CALL", {**block.CALL, "rounds": 1})
    monkeypatch.setattr(block, "STACKS", block.STACKS[:0])
    monkeypatch.setattr(sys, "argv", ["maefast.bench.block", "--json", str(tmp_path / "block.json")])
    block.main()
    assert "x eager" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "block.json").read_text())["records"]) == 2
