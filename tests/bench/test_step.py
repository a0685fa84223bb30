"""The end-to-end step at toy size: peers agree, records are complete. No times are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

from maefast.bench import results, step
from maefast.bench.peers import models, worker


def test_measure(tmp_path, capsys):
    doc = step.measure("toy", peers=("plain", "nonsense"), rounds=2, steps=1)
    assert results.read(results.write(tmp_path / "step.json", doc)) == doc
    assert [r["peer"] for r in doc["records"]] == ["maefast", "plain", "nonsense"]
    ours, plain, nonsense = doc["records"]
    assert ours["ratio"] == 1.0
    assert plain["ratio"] > 0
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    # The same steps on the same weights: training stays together, too.
    assert ours["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-3)
    assert ours["parameters"] == plain["parameters"]
    assert "unknown peer" in nonsense["error"]  # reported, not fatal
    doc["records"] = [ours, plain]
    step.show(doc)
    out = capsys.readouterr().out
    assert "time vs maefast" in out
    assert "plain eager model" in out


class Given:
    """In place of a worker: each process of a peer has times and memory of its own."""

    def __init__(self, size: float):
        self.size, self.seconds = size, iter((size, size, 2.0 * size))  # the first of them is not counted
        self.warm = False

    def send(self, **request) -> None:
        pass

    def receive(self) -> dict:
        return {"loss": 1.0, "grad_norm": 1.0, "parameters": 3}

    def ask(self, do: str, **request) -> dict:
        if do == "run" and not self.warm:
            self.warm = True
            return {"loss": 0.5}
        return {
            "run": lambda: {"loss": 0.5, "seconds": [next(self.seconds)]},
            "memory": lambda: {"peak_bytes": self.size},
            "flops": lambda: {"flops": 1.0},
        }[do]()

    def close(self) -> None:
        pass


def test_rounds_are_spread_over_processes(monkeypatch):
    """Times of all of them, each round against the same round of the other; the median of the bytes."""
    sizes, made = {"maefast": iter((1, 2, 4)), "plain": iter((3, 10, 4))}, []
    monkeypatch.setattr(step, "Peer", lambda name: made.append(name) or Given(next(sizes[name])))
    request, base = {"batch": 2, "dtype": "float32"}, {"preset": "toy"}
    seen: list[int] = []
    ours, plain = step.race(
        ["maefast", "plain"], request, base, "plain", 5, 1, 1.0, progress=lambda r: seen.append(len(r)), processes=3
    )
    assert made == ["maefast", "plain"] * 3
    assert ours["samples_s"] == [1, 2, 2, 4, 4, 8]  # two rounds each: five are rounded up
    assert plain["samples_s"] == [3, 6, 10, 20, 4, 8]
    assert (ours["rounds"], ours["processes"]) == (6, 3)
    assert plain["ratio"] == 3.0  # of 3, 3, 5, 5, 1 and 1
    assert (ours["peak_bytes"], plain["peak_bytes"], plain["memory_ratio"]) == (2, 4, 2.0)
    assert seen == []  # nobody had three rounds
    with pytest.raises(ValueError, match="processes is 0"):
        step.race(["maefast"], request, base, "plain", 1, 1, 1.0, processes=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["maefast", "plain", "hf"])
def test_peers_compute_the_same(peer, dtype):
    if peer == "hf":
        pytest.importorskip("transformers")
    from maefast.models import create

    compare(peer, create(**step.PRESETS["toy"]["model"]), dtype, "step")


def compare(peer: str, model, dtype: str, part: str) -> None:
    answers = {}
    request = {"tokens": model.num_patches, "mask_ratio": 0.6, "part": part}
    for name in ("plain", peer):
        one = worker.Worker()
        answers[name] = one.build(name, model.config, batch=2, dtype=dtype, device="cpu", **request)
    step._agree(answers, dtype)
    assert answers[peer]["parameters"] == answers["plain"]["parameters"]


@pytest.mark.parametrize("part", ["step", "encoder"])
def test_convnets_compute_the_same(part):
    from maefast.models import create

    compare("maefast", create("spark_convnext_tiny", img_size=64, drop_path=0.0, decoder_width=64), "float32", part)
    compare("maefast", create("fcmae_convnextv2_atto", img_size=64), "float32", "step")
    with pytest.raises(ValueError, match="no masked convnet"):
        models.build("hf", create("fcmae_convnextv2_atto", img_size=64).config, 0.6, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graphed_step_computes_the_same(dtype, monkeypatch):
    """On a CPU it is the plain step; and what needs CUDA says so."""
    original, losses = models.task, {}
    for graphed in (False, True):

        def task(*args, graphed=graphed, **keywords):
            return replace(original(*args, **keywords), graphed=graphed)

        monkeypatch.setattr(models, "task", task)
        one = worker.Worker()
        one.build("maefast", _config(), batch=2, dtype=dtype, device="cpu", tokens=16, mask_ratio=0.75)
        assert (one.graphed is not None) == graphed
        losses[graphed] = [one.run(steps=2)["loss"] for _ in range(3)]
    assert losses[True] == losses[False]


def test_peers_that_need_cuda():
    doc = step.measure("toy", peers=("plain_cudagraphs", "maefast_graphed", "plain_graphed"), rounds=1, steps=1)
    for record in doc["records"][1:]:
        assert record["error"] == "ValueError: CUDA graphs need --device cuda, and this is cpu"
    assert set(models.CUDA_PEERS) <= set(models.PEERS) == set(models.NAMES)


def test_what_is_said_about_a_graph():
    records = [{"peer": "maefast", "ratio_graphed": 1.25}, {"peer": "plain", "ratio_graphed": 2.0}, {"peer": "hf"}]
    records.append({"peer": "maefast_graphed", "ratio_graphed": 1.0})
    assert step.graphed(records) == [
        "maefast, vs maefast, step as one CUDA graph: 1.25x",
        "plain eager model, vs maefast, step as one CUDA graph: 2.00x",
    ]


def test_disagreement_is_refused():
    good = {"loss": 1.0, "grad_norm": 2.0}
    step._agree({"plain": good, "maefast": {"loss": 1.0 + 1e-7, "grad_norm": 2.0}}, "float32")
    for bad in (
        {"loss": 1.001, "grad_norm": 2.0},
        {"loss": 1.0, "grad_norm": 2.1},
        {"loss": float("nan"), "grad_norm": 2},
    ):
        with pytest.raises(step.Disagreement, match="maefast"):
            step._agree({"plain": good, "maefast": bad}, "float32")


def test_float64_decides_who_is_right():
    """Where the reference is the one that rounds, nobody is refused for being nearer to the truth."""
    rounded, exact, bad = (
        {"loss": 1.00003, "grad_norm": 2.0},
        {"loss": 1.0, "grad_norm": 2.0},
        {"loss": 0.9, "grad_norm": 2.0},
    )
    truth = lambda: {"loss": 1.0, "grad_norm": 2.0}  # noqa: E731
    step._agree({"plain": rounded, "maefast": exact}, "float32", exact=truth)
    for right in (rounded, exact):
        with pytest.raises(step.Disagreement, match="maefast: loss"):
            step._agree({"plain": right, "maefast": bad}, "float32", exact=truth)
    with pytest.raises(step.Disagreement, match="maefast: loss"):  # far from float64, whoever is near to the reference
        step._agree({"plain": rounded, "maefast": {"loss": 1.0001, "grad_norm": 2.0}}, "float32", exact=truth)
    step._agree({"plain": rounded, "maefast": rounded}, "float32", exact=lambda: pytest.fail("nothing to decide"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_in_float64(dtype):
    """Equal to the float32 one up to its rounding, and training goes on from the same weights."""
    losses = []
    for asked in (False, True):
        one = worker.Worker()
        first = one.build("plain", _config(), batch=2, dtype=dtype, device="cpu", tokens=16, mask_ratio=0.75)
        if asked:
            exact = one.exact()
            for what, tolerance in zip(("loss", "grad_norm"), step.AGREE[dtype], strict=True):
                assert 0 < abs(exact[what] - first[what]) < tolerance * first[what]
        losses.append(one.run(steps=2)["loss"])
    assert losses[0] == losses[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="preset"):
        step.measure("no such")
    with pytest.raises(ValueError, match="unknown peer"):
        models.build("nonsense", {**_config()}, 0.75, "cpu")


def _config() -> dict:
    from maefast.models import create

    return create(**step.PRESETS["toy"]["model"]).config


@pytest.mark.gpu
def test_on_a_gpu():
    records = step.compare("toy", dtype="bfloat16", device="cuda", peers=("plain",), rounds=1, steps=2)
    assert all("step_s" in record for record in records)
    assert torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["toy", "fcmae_toy"])
def test_graphs_on_a_gpu(preset):
    records = step.compare(
        preset, dtype="bfloat16", device="cuda", peers=("plain", "maefast_graphed"), rounds=1, steps=2
    )
    assert all("step_s" in record for record in records), records
