"""The registry, names of public checkpoints, and `pretrain --recipe`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from maefast import recipes
from maefast.cli import app
from maefast.errors import CheckpointError, ConfigError
from maefast.names import Names
from maefast.recipe import Batch
from maefast.recipes.masked_images import MaskedImages
from maefast.train import PretrainConfig, loop, pretrain
from maefast.train.build import build_recipe, recipe_options

FOLDER = Path(recipes.__file__).parent
TOY = {"points": 40, "groups": 8, "group_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1,
       "decoder_num_heads": 2}  # fmt: skip


def test_the_list_names_every_recipe_once():
    specs = recipes.list()
    names = [spec.name for spec in specs]
    assert names == sorted(set(names))
    assert {"mae", "spark", "fcmae", "videomae", "point_mae"} <= set(names)
    for spec in specs:
        assert spec.title
        assert spec.paper
        assert spec.sizes
        assert PretrainConfig(**recipe_options(spec.name, demo=True)).recipe == spec.name
        PretrainConfig(**recipe_options(spec.name))


def test_every_recipe_has_a_row_in_the_docs():
    page = Path("docs/recipes/README.md").read_text()
    assert not [spec.name for spec in recipes.list() if f"`{spec.name}`" not in page]


def test_a_recipe_imports_no_recipe():
    for path in FOLDER.glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("maefast.recipes."):
                assert module.rsplit(".", 1)[1].startswith("_"), f"{path.name} imports {module}"


def test_no_two_recipes_share_a_run_of_more_than_ten_lines():
    """What two recipes share is a part: nn, masking, data, or a module of recipes with an underscore."""
    runs: dict[tuple[str, ...], str] = {}
    for path in sorted(FOLDER.glob("*.py")):
        lines = [line.strip() for line in path.read_text().splitlines()]
        lines = [line for line in lines if line and not line.startswith(("import ", "from "))]
        for start in range(len(lines) - 10):
            first = runs.setdefault(tuple(lines[start : start + 11]), path.name)
            assert first == path.name, f"{first} and {path.name} share eleven lines from {lines[start]!r}"


def test_the_table_is_printed():
    result = CliRunner().invoke(app, ["recipes"])
    assert result.exit_code == 0
    assert "point_mae" in result.output
    assert "arXiv:2203.06604" in result.output


def test_images_are_recipes_too():
    recipe = recipes.create("mae", "tiny", img_size=32, patch_size=8, depth=1, decoder_depth=1, mask_ratio=0.5)
    assert isinstance(recipe, MaskedImages)
    assert recipe.mask_ratio == 0.5
    with pytest.raises(TypeError, match="'mae' takes no width"):
        recipes.create("mae", width=3)


def test_size_is_a_shorthand_for_a_model():
    arguments = {"depth": 1, "decoder_depth": 1}
    torch.manual_seed(0)
    one = build_recipe(PretrainConfig(recipe="mae", size="tiny", model_args=arguments))
    torch.manual_seed(0)
    two = build_recipe(PretrainConfig(model="mae_tiny", model_args=arguments))
    assert one.model.config == two.model.config
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "mea"}, "unknown recipe 'mea'; choose from"),
        ({"recipe": "point_mae", "size": "giant"}, "has no size 'giant'"),
        ({"recipe": "mae", "size": "giant"}, "has no size 'giant'"),
        ({"recipe": "point_mae", "patch_size": 4}, "has no --patch-size"),
        ({"recipe": "point_mae", "flip": 0.25}, "--flip means nothing to the point clouds"),
        ({"recipe": "point_mae", "recompute": True}, "has no --recompute"),
        ({"recipe": "point_mae", "model_args": {"width": 4}}, "takes no width"),
        ({"size": "tiny"}, "--size goes with --recipe"),
        ({"betas": (0.9, 1.0)}, "--betas lie in"),
        ({"recipe": "point_mae", "data": ""}, "or 'demo' for what ships with the recipe point_mae"),
        ({"recipe": "point_mae", "data": "no/such/folder", "model_args": TOY}, "give a folder of clouds, or 'demo'"),
    ],
)
def test_refusals(tmp_path, options, message):
    given = {"data": "demo", "output_dir": str(tmp_path), "device": "cpu", "tensorboard": False, "steps": 1, **options}
    with pytest.raises(ConfigError, match=message):
        pretrain(PretrainConfig(**given))


def test_options_of_the_command_line(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(loop, "pretrain", seen.append)

    def run(*arguments: str) -> PretrainConfig:
        result = CliRunner().invoke(app, ["pretrain", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return seen.pop()

    spec = recipes.kind("point_mae").spec
    demo = run("--recipe", "point_mae", "--demo", "--steps", 3, "--model-arg", "depth=1")
    assert (demo.data, demo.steps, demo.output_dir) == ("demo", 3, "out/point_mae-demo")
    assert demo.model_args == {**spec.demo["model_args"], "depth": 1}
    whole = run("--recipe", "point_mae", "--data", "clouds", "--epochs", 5)
    assert (whole.epochs, whole.lr, whole.betas, whole.steps) == (5, 1e-3, (0.9, 0.999), None)
    assert run("--recipe", "point_mae", "--data", "clouds", "--blr", 1e-4).lr is None
    (tmp_path / "run.yaml").write_text("recipe: point_mae\nepochs: 7\ndata: clouds\n")
    filed = run("--config", tmp_path / "run.yaml", "--demo", "--data", "demo")
    assert (filed.recipe, filed.epochs, filed.steps) == ("point_mae", 7, None)
    for arguments, message in (
        (["--demo"], "--demo goes with --recipe"),
        (["--recipe", "mae", "--model", "mae_base"], "give --model or --recipe, not both"),
        (["--recipe", "videomae", "--demo", "--size", "base"], "give --size or --demo, not both"),
    ):
        result = CliRunner().invoke(app, ["pretrain", *arguments])
        assert result.exit_code == 1
        assert message in result.output


def test_weights_to_start_from(tmp_path):
    common = {"recipe": "point_mae", "data": "demo", "steps": 1, "batch_size": 2, "workers": 0, "device": "cpu",
              "model_args": TOY, "tensorboard": False, "picture_rows": 0, "lr": 1e-3}  # fmt: skip
    pretrain(PretrainConfig(**common, output_dir=str(tmp_path / "one"), seed=1))
    torch.manual_seed(0)
    recipe = recipes.create("point_mae", **TOY)
    recipes.load_weights(recipe, tmp_path / "one")
    torch.save(recipes.public_weights(recipe), tmp_path / "public.pth")
    for start in (tmp_path / "one", tmp_path / "public.pth"):
        out = tmp_path / f"from-{start.stem}"
        pretrain(PretrainConfig(**common, output_dir=str(out), init_from=str(start)))
        assert (out / "checkpoints").is_dir()
    other = {**common, "model_args": {**TOY, "depth": 2}}
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.1.*is missing"):
        pretrain(PretrainConfig(**other, output_dir=str(tmp_path / "two"), init_from=str(tmp_path / "public.pth")))


def test_names_go_both_ways():
    names = Names(("a.", "x.y."), ("a.b.", "z."), ("last", "w.last"), pointwise=("a.b.",), unused=("gone.",))
    tensors = {"a.c": torch.zeros(2), "a.b.d": torch.ones(2, 3, 1), "last": torch.zeros(1), "gone.e": torch.zeros(1)}
    ours = names.to_ours(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        "x.y.c": (2,),
        "z.d": (2, 3),
        "w.last": (1,),
    }
    back = names.to_public(ours)
    assert {name: tuple(t.shape) for name, t in back.items()} == {"a.c": (2,), "a.b.d": (2, 3, 1), "last": (1,)}
    flat = Names(("", "model."), ("head.", "head."))
    assert [flat.ours_of(name) for name in ("blocks.0", "head.0")] == ["model.blocks.0", "head.0"]
    assert [flat.public_of(name) for name in ("model.blocks.0", "head.0")] == ["blocks.0", "head.0"]
    with pytest.raises(ValueError, match="must stand in one pair only"):
        Names(("a", "b"), ("c", "b"))
    with pytest.raises(ValueError, match="the same name"):
        Names(("a.", "b.")).to_ours({"a.c": torch.zeros(1), "b.c": torch.zeros(1)})


def test_a_batch_without_keys_is_drawn_by_torch():
    recipe = recipes.create("point_mae", **TOY)
    from maefast.data.points import PointBatch

    batch = PointBatch(torch.randn(2, 40, 3))
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(recipe.view(batch).plan.mask)
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert len(Batch()) == 0


def test_importing_recipes_needs_no_training_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['PIL', 'matplotlib', 'accelerate', 'skimage'])); "
        "import maefast; maefast.recipes.create('point_mae', depth=1)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
