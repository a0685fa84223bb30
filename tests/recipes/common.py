"""What every recipe has to show; its own tests add what is its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maefast import recipes
from maefast.recipe import Batch, Output, Recipe, View
from maefast.train import PretrainConfig, graph, loop, pretrain
from maefast.train.build import recipe_options
from tests.budget import ALL_EXAMPLES
from tests.train.common import losses, rows


class RecipeTests:
    """A subclass sets `name` and `toy`, and defines `batch`. It is held against `bench.peers.recipes.<name>.reference`,
    the terms of the loss in plain PyTorch.

    Attributes:
        name: of the recipe. toy: arguments that make it small, two blocks of 16 or so channels.
        run: options of a run on the demo's data with these arguments.
        demo_share: of a demo's steps, enough to beat the baseline by some per cent; users run all of them.
        taught: a teacher's states are the target. mask_of_teacher: it says what is masked, too.
    """

    name: str
    toy: Mapping[str, Any]
    run: Mapping[str, Any] = {}
    demo_share = 0.4
    taught = mask_of_teacher = False

    def batch(self, recipe: Recipe, size: int = 3) -> Batch:
        """Random samples; samples of a larger size begin with those of a smaller one."""
        raise NotImplementedError

    @property
    def reference(self) -> Callable[[Recipe, View], Mapping[str, Tensor]]:
        return importlib.import_module(f"maefast.bench.peers.recipes.{self.name}").reference

    def make(self, **changes: Any) -> Recipe:
        torch.manual_seed(0)
        recipe = recipes.create(self.name, **{**self.toy, **changes}).double()
        scatter(recipe)
        return recipe.eval()

    # --- the loss

    def test_loss_and_gradients(self):
        recipe = self.make()
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_a_batch_is_prepared_by_the_recipe(self):
        recipe = self.make()
        batch = self.batch(recipe)
        output = recipe(batch)
        assert isinstance(output, Output)
        assert output.loss.isfinite()
        one, two = (recipe(recipe.view(batch, seed=5)).loss for _ in range(2))
        assert torch.equal(one, two)
        assert not torch.equal(one, recipe(recipe.view(batch, seed=6)).loss)

    def test_the_baseline_has_the_same_terms(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        trivial = recipe.baseline(view)
        assert trivial.loss.isfinite()
        assert trivial.terms.keys() <= recipe(view).terms.keys()

    def test_autocast_is_the_teachers(self):
        """What is prepared under autocast is what is prepared without, but for what teachers say."""
        recipe = self.make().float()
        batch = self.batch(recipe)
        exact = recipe.view(batch, seed=5)
        with torch.autocast("cpu", torch.bfloat16):
            found = recipe.view(batch, seed=5)
            low = recipe(found).loss
        assert low.isfinite()
        assert abs(low - recipe(exact).loss) < 0.1 * recipe(exact).loss
        assert same(exact.parts, found.parts)
        assert self.mask_of_teacher or same(exact.plan, found.plan)
        assert same(exact.target, found.target) != self.taught

    # --- what it is called

    def test_spec_and_names(self):
        recipe = self.make()
        assert recipes.kind(self.name) is type(recipe)
        assert recipe.spec.name == self.name
        assert Path("docs/recipes", f"{self.name}.md").is_file()
        own = recipe.state_dict()
        assert recipe.names.to_ours(recipes.public_weights(recipe)).keys() == own.keys()

    def test_every_size_can_be_built(self):
        for size in recipes.kind(self.name).spec.sizes:
            with torch.device("meta"):
                recipe = recipes.create(self.name, size)
            assert recipe.config["name"] == self.name

    def test_weights_come_back(self, tmp_path):
        one, two = self.make(), self.make()
        with torch.no_grad():
            for parameter in two.parameters():
                parameter.add_(1)
        unused = {f"{start}x": torch.zeros(2) for start in one.names.unused}
        torch.save({"model": {**recipes.public_weights(one), **unused}}, tmp_path / "public.pth")
        recipes.load_weights(two, tmp_path / "public.pth")
        for name, tensor in one.state_dict().items():
            assert torch.equal(two.state_dict()[name], tensor), name

    def test_bad_input(self):
        recipe = self.make()
        with pytest.raises(TypeError, match="wanted"):
            recipe(Batch())
        with pytest.raises(TypeError, match=r"\wBatch is wanted, got Tensor"):
            recipe(torch.zeros(2, 3))

    # --- a run

    def config(self, out: Path, **changes: Any) -> PretrainConfig:
        options = recipe_options(self.name, demo=True)
        small = {
            "model_args": dict(self.toy), "steps": 6, "batch_size": 4, "workers": 0, "device": "cpu", "save_every": 2,
            "picture_every": 0, "picture_rows": 2, "tensorboard": False, "output_dir": str(out),
        }  # fmt: skip
        return PretrainConfig(**{**options, **small, **self.run, **changes})

    def test_a_run_goes_on_where_it_was_stopped(self, tmp_path, monkeypatch):
        pretrain(self.config(tmp_path / "whole"))
        original = loop.Run._step

        def step(run):
            if run.done == 5:  # the last checkpoint holds 4
                raise KeyboardInterrupt
            original(run)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                pretrain(self.config(tmp_path / "parts"))
        pretrain(self.config(tmp_path / "parts"))
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
        assert len({loss for _, loss, _ in losses(tmp_path / "whole")}) == 6
        for row in rows(tmp_path / "whole"):
            terms = [float(value) for name, value in row.items() if name.startswith("loss/")]
            assert not terms or sum(terms) == pytest.approx(float(row["loss"]), rel=1e-5)
        assert (tmp_path / "whole" / "reconstruction.png").is_file()

    @pytest.mark.slow
    def test_the_demo_beats_the_baseline(self, tmp_path):
        if not ALL_EXAMPLES:
            pytest.skip("a demo takes up to a minute; MAEFAST_ALL_EXAMPLES=1 runs them")
        torch.set_num_threads(1)
        options = {**recipe_options(self.name, demo=True), "output_dir": str(tmp_path), "tensorboard": False}
        options["steps"] = round(self.demo_share * options["steps"])
        result = pretrain(PretrainConfig(**options, device="cpu", workers=0))
        loss, trivial = result.baseline
        assert loss < trivial
        assert (tmp_path / "reconstruction.png").is_file()


def same(one: Any, other: Any) -> bool:
    """Whether both views, or parts of them, hold the same numbers of the same dtypes."""
    one, other = (list(tensors(graph.take_apart(value))) for value in (one, other))
    return len(one) == len(other) and all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(one, other))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        yield from tensors(inner)


def scatter(recipe: Recipe) -> None:
    """Give every vector and token of a recipe a value of its own, so that no zero hides an error."""
    with torch.no_grad():
        for parameter in recipe.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def equal_to_reference(
    recipe: Recipe, view: View, reference: Callable[[Recipe, View], Mapping[str, Tensor]], tolerance: float = 1e-9
) -> None:
    """Terms, and the gradient of every parameter, in float64."""
    found, mine = recipe(view), {}
    found.loss.backward()
    for name, parameter in recipe.named_parameters():
        mine[name], parameter.grad = parameter.grad, None
    want = reference(recipe, view)
    assert found.terms.keys() == want.keys()
    for name, term in want.items():
        torch.testing.assert_close(found.terms[name].double(), term, rtol=tolerance, atol=tolerance)
    sum(want.values()).backward()
    largest = max(p.grad.norm() for p in recipe.parameters() if p.grad is not None)
    for name, parameter in recipe.named_parameters():
        if parameter.grad is None:
            assert mine[name] is None or not mine[name].any(), f"{name} has a gradient, and none in the reference"
            continue
        got = torch.zeros_like(parameter) if mine[name] is None else mine[name]
        # A bias in front of a batch norm has the gradient zero, and what is found there is rounding.
        error = (got - parameter.grad).norm() / torch.maximum(parameter.grad.norm(), 1e-6 * largest)
        assert error < tolerance, f"gradient of {name}: relative error {error:.1e}"
        parameter.grad = None
