"""Recipes, toys, blocks: both sides are run, the limit is of the plain side's work, and a file grows case by case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("transformers")

import maefast
from maefast import ops
from maefast.bench import block, machine, recipes, results, scaling, toys, volumes, worth
from tests.bench.common import LIMITS


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda *given: LIMITS)
    monkeypatch.setattr(recipes, "memory", lambda *given: 1.0)


def test_attention_on_a_cpu_counts():
    q, k, v = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    products = 2 * 2 * 2 * 3 * 8 * 8 * 16

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    assert machine.count_flops(attend) == products
    assert machine.count_flops(lambda: attend().sum().backward()) > 3 * products - 1
    assert machine.count_flops(lambda: F.linear(q, torch.randn(5, 16))) == 2 * 2 * 3 * 8 * 16 * 5


def test_a_share_of_one_side_or_several():
    found = machine.share({"copy_gb_s": None, "matrix_tflops": {"float32": 1.0}}, "float32", 10**12, 4.0, 2.0)
    assert found == {"flops": 10**12, "limit": "matrix", "limit_share": [0.25, 0.5]}
    assert machine.share(LIMITS, "float32", 10**11, 2.0)["limit_share"] == 0.5
    assert machine.share(LIMITS, "float32", None, 2.0) == machine.share(None, "float32", 1, 2.0) == {}


def test_a_recipe(tmp_path, capsys):
    """A file for each recipe, or one for all that grows."""
    given = ["point_mae", "--batch", "1", "--rounds", "1"]
    assert recipes.main([*given, "--results", str(tmp_path / "all")]) == 0
    (path,) = (tmp_path / "all").rglob("*.json")
    (record,) = results.read(path)["records"]
    plain, ours = record["ms"]
    assert record["flops"] > 10**9
    assert record["limit_share"] == pytest.approx([record["flops"] / 1e11 / (ms / 1e3) for ms in (plain, ours)])
    assert "of limit" in capsys.readouterr().out


def test_recipes_leave_what_was_done(tmp_path, monkeypatch):
    def compare(name, size, batch, dtype, rounds, device, limits):
        if name == "videomae":
            raise KeyboardInterrupt
        return {
            **{"recipe": name, "size": "any", "batch": batch, "dtype": dtype, "ms": [2.0, 1.0], "ratio": 2.0},
            **{"memory_mib": [1.0, 1.0], "memory_ratio": 1.0, "other_ways": {}},
        }

    monkeypatch.setattr(recipes, "compare", compare)
    path = tmp_path / "recipes.json"
    with pytest.raises(KeyboardInterrupt):
        recipes.main(["point_mae", "mr_mae", "videomae", "--json", str(path)])
    doc = results.read(path)
    assert [record["recipe"] for record in doc["records"]] == ["point_mae", "mr_mae"]
    assert doc["settings"]["cases_left_out"] == 1


def test_the_fewer_of_both_sides_count_and_masked_convolutions_do_not():
    a, b = torch.randn(4, 8), torch.randn(8, 2)
    once, twice = (lambda: a @ b), (lambda: torch.cat([a, a]) @ b)
    for plain, ours in ((once, twice), (twice, once)):
        assert recipes.needed_flops("videomae", plain, ours) == 2 * 4 * 8 * 2
    for name in recipes.DENSE:
        assert recipes.peers(name).reference
        assert recipes.needed_flops(name, once, twice) is None


def test_our_kernels_are_counted_by_the_reference():
    """A linear layer of ours and torch's, and attention: the same products."""
    x, weight = torch.randn(2, 6, 3 * 2 * 8), torch.randn(48, 48)

    def ours() -> torch.Tensor:
        return ops.attention(ops.linear(x, weight).view(2, 6, 3, 2, 8))

    def plain() -> torch.Tensor:
        q, k, v = F.linear(x, weight).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    products = 2 * 2 * 6 * 48 * 48 + 2 * 2 * 2 * 2 * 6 * 6 * 8
    with torch.no_grad():
        assert machine.count_flops(plain) == products
        with maefast.backend("reference"):
            assert machine.count_flops(ours) == products


def test_toys_leave_what_was_done(tmp_path, monkeypatch):
    real, done = toys.compare, []

    def compare(*given):
        if done:
            raise KeyboardInterrupt
        done.append(given)
        return real(*given)

    monkeypatch.setattr(toys, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        toys.main(["--rounds", "1", "--json", str(tmp_path / "toys.json")])
    doc = results.read(tmp_path / "toys.json")
    (record,) = doc["records"]
    assert doc["settings"]["cases_left_out"] == 2 * len(toys.MODELS) - 1
    assert record["flops"] > 10**6
    assert all(share > 0 for share in record["limit_share"])


def test_blocks_leave_what_was_done(tmp_path, monkeypatch):
    real, done = block.measure, []

    def measure(*given, **more):
        if done:
            raise KeyboardInterrupt
        done.append(more)
        return real(*given, **{**more, "rounds": 1, "calls": 1, "limits": LIMITS})

    monkeypatch.setattr(block, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        block.main(["--json", str(tmp_path / "block.json")])
    doc = results.read(tmp_path / "block.json")
    assert doc["settings"]["cases_left_out"] == len(block.STACKS)
    ours, eager = doc["records"]
    assert ours["flops"] == eager["flops"] > 0
    assert ours["limit_share"] == pytest.approx(ours["flops"] / 1e11 / ours["best_s"])


@pytest.mark.parametrize("module", [recipes, volumes, toys, block, scaling])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(module, capsys):
    assert module.main(["--device", "cuda"]) == 3
    assert "no CUDA device here" in capsys.readouterr().err


def test_a_clock_waits_for_the_device(monkeypatch):
    """Before the first call, and after the last."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    worth.seconds(lambda: events.append("call"), 2, "cuda")
    assert events == ["wait", "call", "call", "wait"]
    events.clear()
    worth.in_turn([lambda: events.append("call")], 1)
    assert "wait" not in events
