"""What is taken from an encoder, and that nobody notices."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maefast import recipes
from maefast.data.images.batch import ImageBatch
from maefast.errors import BadImage, ConfigError
from maefast.models.spark import SparK
from maefast.probe.features import Features, extract, kept, lead_tokens, no_features, pool, raw_pixels, undisturbed
from maefast.probe.samples import batches, fixed
from maefast.recipe import Batch, Recipe
from maefast.recipes.masked_images import MaskedImages
from tests.recipes.common import RecipeTests
from tests.train.common import FCMAE, TINY, tiny_config, toy_spark, write_photos
from tests.train.curves import CurveRecipe, CurveSource

NAMES = [spec.name for spec in recipes.list() if (Path("tests/recipes") / f"test_{spec.name}.py").is_file()]


def find_tests(name: str) -> RecipeTests:
    module = importlib.import_module(f"tests.recipes.test_{name}")
    return next(
        value()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RecipeTests) and getattr(value, "name", None) == name
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe(name):
    """One row a sample, whatever else is in the batch; only a class token is taken for one."""
    tests = find_tests(name)
    recipe = tests.make()
    assert no_features(recipe) is None
    batch = tests.batch(recipe, 3)
    packed = name in ("graphmae", "lv_mae", "m3ae")  # samples of any length, not to be cut out
    alone = tests.batch(recipe, 1) if packed else batch._each(lambda tensor: tensor[:1])
    found = extract(recipe, [(batch, list(range(len(batch))), [])], "cpu")
    assert found.mean.shape[0] == len(batch)
    assert found.mean.ndim == 2
    assert found.mean.dtype is torch.float32
    single = extract(recipe, [(alone, [0], [])], "cpu")
    assert torch.allclose(single.mean, found.mean[:1], atol=1e-5)
    if found.first is not None:
        assert found.first.shape == found.mean.shape
        assert torch.allclose(single.first, found.first[:1], atol=1e-5)
    without = {
        "dmjd",
        "graphmae",
        "hicmae",
        "i2p_mae",
        "m3ae",
        "mfm",
        "mr_mae",
        "point_mae",
        "spark3d",
        "tgm",
        "videomae",
        "videomae_v2",
        "q_former_ae",
    }
    assert (found.first is None) == (name in without)


def images(count: int, channels: int, *size: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, *size)
    return ImageBatch(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), key=np.arange(count))


def test_models_of_images():
    vit = recipes.create("mae", model="mae", img_size=16, patch_size=4, **TINY).eval()
    batch = images(3, 3, 16, 16)
    tokens = vit.encode(batch)
    assert tokens.shape == (3, 17, 16)
    assert torch.equal(tokens, vit.model.encode(vit.images(batch)))
    assert lead_tokens(vit) == 1
    mean, first = pool(tokens, batch, 1)
    assert torch.equal(first, tokens[:, 0])
    assert torch.equal(mean, tokens[:, 1:].mean(1))
    for recipe in (
        recipes.create("fcmae", model="fcmae", img_size=64, **FCMAE),
        MaskedImages(toy_spark("", img_size=64), 0.6),
    ):
        batch = images(2, 3, 64, 64)
        recipe.eval()
        maps = recipe.encode(batch)
        own = recipe.model.encode(recipe.images(batch))
        assert torch.equal(maps, own[-1] if isinstance(recipe.model, SparK) else own)
        assert maps.shape[2:] == (2, 2)
        mean, first = pool(maps, batch, lead_tokens(recipe))
        assert torch.allclose(mean, maps.mean((2, 3)))
        assert first is None


def test_who_has_no_features():
    class Blind(nn.Module):
        in_chans, img_size, num_patches = 3, 16, 4

    assert no_features(CurveRecipe()) == "CurveRecipe gives no features of whole inputs"
    assert "Blind gives no features of whole inputs: it has no `encode`" in no_features(MaskedImages(Blind(), 0.5))


def test_pools():
    features = Features(torch.ones(2, 3), torch.zeros(2, 3), [0, 1])
    assert features.pooled("both").tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert features.pooled("cls").sum() == 0
    with pytest.raises(ConfigError, match="--pool cls: this encoder has no class token; use --pool mean"):
        Features(torch.ones(2, 3), None, [0, 1]).pooled("cls")


class Noisy(Recipe):
    """Draws, counts, and is partly in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.quiet = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.quiet.eval()
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.norm(self.first(torch.rand(2, 3)))


def test_nobody_notices():
    recipe = Noisy().train()
    recipe.quiet.eval()
    before = {name: value.clone() for name, value in recipe.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    extract(recipe, [(Batch(), [0, 1], [])] * 2, "cpu")
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in recipe.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in recipe.state_dict().items())
    with pytest.raises(ZeroDivisionError), undisturbed(recipe):
        raise ZeroDivisionError
    assert recipe.training


def test_broken_weights():
    recipe = recipes.create("mae", model="mae", img_size=16, patch_size=4, **TINY)
    nn.init.constant_(recipe.model.norm.weight, float("nan"))
    with pytest.raises(ConfigError, match="the features are not finite"):
        extract(recipe, [(images(2, 3, 16, 16), [0, 1], [])], "cpu")


def test_raw_pixels():
    batch = images(2, 3, 64, 32)
    rows = raw_pixels(batch)
    assert rows.shape == (2, 3 * 32 * 32)
    assert torch.allclose(rows.view(2, 3, 32, 32), batch.images.float().view(2, 3, 32, 2, 32).mean(3))
    assert raw_pixels(Batch()) is None


def test_features_are_kept(tmp_path):
    made = []

    def compute() -> Features:
        made.append(Features(torch.rand(2, 3), torch.rand(2, 3), [4, 7], [("a.png", "broken")]))
        return made[-1]

    one, cached = kept(tmp_path / "features", ["weights", "data"], compute)
    assert not cached
    two, cached = kept(tmp_path / "features", ["weights", "data"], compute)
    assert cached
    assert len(made) == 1
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.first, two.first)
    assert (two.index, two.bad) == ([4, 7], [("a.png", "broken")])
    assert not kept(tmp_path / "features", ["weights", "other data"], compute)[1]
    for path in (tmp_path / "features").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert not kept(tmp_path / "features", ["weights", "data"], compute)[1]


def opened(tmp_path, **changes):
    data = write_photos(tmp_path / "photos")
    recipe = recipes.create("mae", model="mae", img_size=16, patch_size=4, **TINY)
    return data, recipe.wants.open(tiny_config(data, tmp_path / "out", **changes))


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_images(tmp_path, workers):
    """Each once, in order, as `examples` shows them."""
    _, source = opened(tmp_path)
    samples = fixed(source)
    assert list(samples.names) == sorted(samples.names)
    assert samples.names[0] == "group0/image00.png"
    found = list(batches(samples, range(10), 4, workers=workers))
    assert [which for _, which, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.cat([batch.images for batch, _, _ in found]), source.examples(10)[0].images)
    some, which, _ = next(batches(samples, [7, 2], 4))
    assert which == [7, 2]
    assert torch.equal(some.images, source.examples(10)[0].images[[7, 2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images(tmp_path, workers):
    data, source = opened(tmp_path)
    (data / "group0" / "image03.png").write_bytes(b"broken")
    samples = fixed(source)
    with pytest.raises(BadImage, match=r"image03.png.*--skip-bad"):
        list(batches(samples, range(10), 4, workers=workers))
    place = samples.names.index("group0/image03.png")
    found = list(batches(samples, range(10), 4, workers=workers, skip_bad=True))
    assert [i for _, which, _ in found for i in which] == [i for i in range(10) if i != place]
    assert [Path(name).name for _, _, bad in found for name, _ in bad] == ["image03.png"]
    identity = fixed(source).identity()
    (data / "group0" / "image03.png").write_bytes(b"broken again")
    assert fixed(source).identity() != identity
    with pytest.raises(ConfigError, match=r"no sample can be read.*image03.png"):
        extract(CurveRecipe(), batches(samples, [place], 4, skip_bad=True), "cpu")


def test_samples_of_any_source():
    """The curves of a recipe of one's own, which are neither files nor a collection."""
    source = CurveSource(8, 5, 0)
    samples = fixed(source)
    assert samples.names == [f"curve {i}" for i in range(5)]
    found = list(batches(samples, [0, 3, 4], 2))
    assert torch.equal(torch.cat([batch.values for batch, _, _ in found]), source.examples(5)[0].values[[0, 3, 4]])
