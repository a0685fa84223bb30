"""The trainer on a recipe of its own kind: no image anywhere, two terms, a teacher, two streams of random numbers."""

from __future__ import annotations

import ast
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import maefast
from maefast import masking, seeds
from maefast.recipe import Output, Progress, View
from maefast.train import CheckpointError, ConfigError, checkpoint, graph, loop, pretrain
from maefast.train.config import load_config
from tests.train import victims
from tests.train.common import CREATORS, losses, rows, run_process, run_together, tiny_config
from tests.train.curves import CurveRecipe, CurveSource
from tests.train.test_graph import equal_runs, taped  # noqa: F401 (a fixture)

PACKAGE = Path(maefast.__file__).parent


def curve_config(out: Path, **changes):
    arguments = {"model": "curves", "model_args": {}, "img_size": None, "patch_size": None, "clip": 1.0}
    return tiny_config(changes.pop("data", "20"), out, **{**arguments, **changes})


def train(out: Path, **changes):
    return pretrain(curve_config(out, **changes), create_model=CREATORS["curves"])


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_and_resumed(tmp_path, workers):
    """Losses, weights, moments and the teacher are those of an undisturbed run."""
    whole, parts = (curve_config(tmp_path / n, accum=2, workers=workers) for n in ("whole", "parts"))
    assert run_process(victims.train, whole) == 0
    assert run_process(victims.train_and_die, parts, "in a step", 8) == -signal.SIGKILL
    assert run_process(victims.train, parts) == 0
    assert "6 steps done" in (tmp_path / "parts" / "log.txt").read_text()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len({loss for _, loss, _ in losses(tmp_path / "whole")}) == 12
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        one, two = (load_file(tmp_path / run / "checkpoints" / "step-00000012" / file) for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
    weights = load_file(tmp_path / "whole" / "checkpoints" / "step-00000012" / checkpoint.MODEL)
    assert {"encoder.weight", "teacher"} <= weights.keys()  # its own names
    torch.manual_seed(0)
    assert not torch.equal(weights["teacher"], CurveRecipe().teacher)  # it has followed


def test_two_processes_equal_one(tmp_path):
    single = curve_config(tmp_path / "one", batch_size=8)
    assert run_process(victims.train, single) == 0
    assert run_together(victims.train_as, 2, replace(single, output_dir=str(tmp_path / "two"), batch_size=4)) == [0, 0]
    one, two = ([float(loss) for _, loss, _ in losses(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"accum": 2, "amp": "bf16"}])
def test_as_a_graph(tmp_path, taped, changes):  # noqa: F811
    for name in ("off", "on"):
        train(tmp_path / name, graph=name, **changes)
    assert taped[0].events.count("replay") == 9
    equal_runs(tmp_path / "off", tmp_path / "on")


def test_what_is_called_when(tmp_path):
    """`prepare` once for each micro-batch, without gradients, before its step; `after_step` once, behind it."""
    recipe = CurveRecipe()
    config = curve_config(tmp_path, steps=3, accum=2, batch_size=4, picture_rows=2, picture_every=2)
    pretrain(config, create_model=lambda name: recipe)
    calls = recipe.seen
    steps = [(f"{c[0]}", c[1].step) for c in calls]
    first, second, third = ([str(list(range(s + i, s + i + 4))) for i in (0, 4)] for s in (0, 8, 16))
    assert steps == [
        *((keys, 0) for keys in first), ("after", 1),
        *((keys, 1) for keys in second), ("after", 2), ("[0, 1]", 2),
        *((keys, 2) for keys in third), ("after", 3), ("[0, 1]", 3),
    ]  # fmt: skip
    assert not any(call[2] for call in calls)
    assert [call[3] for call in calls if call[0] == [0, 1]] == [False, False]
    assert all(call[3] for call in calls if call[0] not in ("after", [0, 1]))
    assert calls[-1][1] == Progress(3, 3, 1.2)


def test_the_first_step_by_hand(tmp_path):
    train(tmp_path, steps=1, seed=5)
    torch.manual_seed(5)
    recipe, source = CurveRecipe(), CurveSource(8, 20, 5)
    order = seeds.permutation(5, 0, 20)
    batch, _ = source.collate([source[p, 0, int(order[p])] for p in range(4)])
    view = recipe.prepare(batch, seeds.Draw(5, batch.key), Progress(0, 1, 0.0))
    noise = torch.from_numpy(np.stack([seeds.mask_noise(5, p, 8) for p in range(4)]))
    assert torch.equal(view.plan.mask, masking.random(4, 8, keep=3, noise=noise).mask)
    output = recipe(view)
    assert float(rows(tmp_path)[0]["loss"]) == output.loss.item()
    assert output.loss.item() == (output.terms["points"] + output.terms["teacher"]).item()


def test_what_is_left_and_said(tmp_path, capsys):
    result = train(tmp_path, picture_rows=3, tensorboard=True)
    assert result.total == 12
    text = capsys.readouterr().out
    assert "curves are free" in text
    assert "20 curves of thin air; steps 0 to 12 of 4 curves" in text
    assert "curves/s" in text
    assert "image" not in text
    assert float(rows(tmp_path)[-1]["curves_per_s"]) > 0
    assert "# curves: 20" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml")["data"] == "20"
    assert (tmp_path / "reconstruction.txt").read_text() == "curves, step 12, hidden points: curve 0, curve 1, curve 2"
    with Image.open(tmp_path / "reconstruction.png") as image:
        assert image.size == (5, 3)
    assert float(rows(tmp_path)[-1]["loss"]) < float(rows(tmp_path)[0]["loss"])


def test_words_of_a_configuration_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("amp: no\ngraph: on\nflip: 1e-1\nnorm_pix: false\nsteps: 1e2\n")
    assert load_config(path) == {"amp": "no", "graph": "on", "flip": 0.1, "norm_pix": False, "steps": 100}


def test_what_changed_is_told(tmp_path, capsys):
    train(tmp_path, steps=3)
    capsys.readouterr()
    train(tmp_path, steps=4, data="24", batch_size=2)
    text = capsys.readouterr().out
    assert "curves: 20 -> 24" in text
    assert "curves per step: 4 -> 2" in text
    with pytest.raises(CheckpointError, match=r"another model.*width: 6 -> 7"):
        train(tmp_path, steps=5, model_args={"width": 7})
    with pytest.raises(ConfigError, match="'curves' has no --recompute"):
        train(tmp_path / "new", recompute=True)


def test_a_recipe_that_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(CurveRecipe, "picture", lambda self, view, names: None)
    train(tmp_path, steps=1, picture_rows=1, tensorboard=True)
    assert not (tmp_path / "reconstruction.png").exists()


# --- the parts


def test_numbers_follow_the_place_in_the_run():
    key = np.array([7, 0, 2**62, 7])
    drawn = seeds.Draw(3, key).uniform("mask", 13)
    assert drawn.dtype == torch.float32
    for row, place in zip(drawn, key):
        assert np.array_equal(row.numpy(), seeds.mask_noise(3, int(place), 13))
    assert torch.equal(seeds.Draw(3, [0]).uniform("mask", 13)[0], drawn[1])  # whatever else is in the batch
    assert torch.equal(seeds.Draw(3, key).uniform("mask", 5), drawn[:, :5])
    others = [
        seeds.Draw(3, key).uniform("shift", 13),
        seeds.Draw(4, key).uniform("mask", 13),
        seeds.Draw(3, key, seeds.PICTURE).uniform("mask", 13),
    ]
    assert np.array_equal(others[2][1].numpy(), seeds.mask_noise(3, 0, 13, seeds.PICTURE))
    values = torch.stack([drawn[:3], *(other[:3] for other in others)])
    assert len(values.unique()) == values.numel()


def test_names_of_streams_are_part_of_the_format():
    first = [seeds.Draw(0, [0]).uniform(what, 1).item() for what in ("mask", "shift")]
    assert first == [0.12039345502853394, 0.613154947757721]


def test_the_loss_is_summed_in_float32():
    terms = {name: torch.tensor(value, dtype=torch.bfloat16) for name, value in (("a", 256.0), ("b", 1.0))}
    loss = Output(terms, None, View(None, None)).loss
    assert (loss.dtype, loss.item()) == (torch.float32, 257.0)
    double = Output({"a": torch.tensor(1.0, dtype=torch.float64)}, None, View(None, None)).loss
    assert double.dtype is torch.float64


def test_views_are_taken_apart_and_put_together():
    plan = masking.random(2, 6, keep=2)
    point = Progress(1, 2, 0.5)
    view = View({"a": torch.ones(2), "b": [torch.zeros(1), 3], 4: "c"}, (plan, plan.complement()), point)
    taken = graph.take_apart(view)
    assert taken["plan"][0]["slot"] is plan.slot
    again = graph.put_together(graph.kinds(view), taken)
    assert type(again) is View
    assert again.parts["a"] is view.parts["a"]
    assert again.parts["b"] == view.parts["b"]
    assert again.parts[4] == "c"
    assert [type(part) for part in again.plan] == [type(plan)] * 2
    assert vars(again.plan[1]) == vars(view.plan[1])
    assert again.target == point
    assert type(again.target) is Progress


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            place = ["maefast", *path.relative_to(PACKAGE).parts[:-1]]
            above = place[: len(place) + 1 - node.level] if node.level else []
            base = ".".join([*above, node.module or ""]).strip(".")
            found |= {base, *(f"{base}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("part", ["data", "models", "nn", "ops", "recipe.py", "recipes", "seeds.py"])
def test_nothing_below_imports_the_trainer(part):
    place = PACKAGE / part
    for path in [place] if place.is_file() else place.rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("maefast.train")], path


def test_the_trainer_knows_no_images():
    assert "maefast.train.checkpoint" in imports(Path(loop.__file__))  # the helper finds what there is
    generic = ["accelerator", "checkpoint", "data", "graph", "loop", "resume", "schedule", "signals"]
    for path in [*(PACKAGE / "train" / f"{name}.py" for name in generic), PACKAGE / "recipe.py"]:
        assert not re.findall(r"(?i)(?<!add_)image|patch|noise", path.read_text()), path  # add_image is TensorBoard's
