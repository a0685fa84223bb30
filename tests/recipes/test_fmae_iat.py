from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maefast import recipes
from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.dmae import autoencoder, patches
from maefast.data.annotated import AnnotatedBatch
from maefast.data.images.batch import ImageBatch
from maefast.data.shapes_on_textures import shapes_on_texture
from tests.recipes.common import RecipeTests, equal_to_reference, scatter

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


class TestFMAEIAT(RecipeTests):
    name = "fmae_iat"
    toy = {**SIZES, "units": 3, "subjects": 5, "drop_path": 0.0}
    run = {"img_size": 16, "patch_size": 8}

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
        units = torch.randint(0, 2, (3, 3), generator=generator).float()
        return AnnotatedBatch(images[:size], units[:size], torch.tensor([4, 0, 2])[:size])

    def test_a_batch_is_prepared_by_the_recipe(self):
        """Nothing is random in it."""
        recipe = self.make()
        batch = self.batch(recipe)
        assert torch.equal(recipe(batch).loss, recipe(recipe.view(batch, seed=6)).loss)

    def test_without_the_second_head(self):
        recipe = self.make(reversal=0.0)
        view = recipe.view(self.batch(recipe), seed=1)
        assert recipe(view).terms.keys() == {"units"}
        equal_to_reference(recipe, view, self.reference)

    @pytest.mark.parametrize("scale", [0.5, 2.0])
    def test_the_encoder_unlearns_what_the_head_learns(self, scale):
        recipe = self.make(reversal=scale)
        view = recipe.view(self.batch(recipe), seed=1)
        inner = [p for name, p in recipe.named_parameters() if p.requires_grad and not name.startswith("heads.")]
        head = list(recipe.heads["subjects"].parameters())
        mine = torch.autograd.grad(recipe(view).terms["subjects"], [*inner, *head])
        found = recipe.norm(recipe.encoder.states(view.parts)[0][:, 1:].mean(1))
        plain = F.binary_cross_entropy_with_logits(recipe.heads["subjects"](found), view.target["subjects"])
        for got, want in zip(mine, torch.autograd.grad(plain, [*inner, *head])):
            factor = 1.0 if any(got.shape == p.shape for p in head) else -scale
            torch.testing.assert_close(got, factor * want, rtol=1e-12, atol=1e-15)

    def test_layers_have_their_own_rates(self):
        recipe = self.make(layer_decay=0.5)
        groups = recipe.parameter_groups(0.05)
        rate = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(rate) == sum(p.requires_grad for p in recipe.parameters())
        assert rate[id(recipe.heads["units"].weight)] == (1.0, 0.05)
        assert rate[id(recipe.norm.weight)] == (1.0, 0.0)
        assert rate[id(recipe.encoder.blocks[1].attn.qkv.weight)] == (0.5, 0.05)
        assert rate[id(recipe.encoder.blocks[0].attn.qkv.bias)] == (0.25, 0.0)
        assert rate[id(recipe.encoder.patch_embed.proj.weight)] == (0.125, 0.05)
        assert rate[id(recipe.encoder.pos_embed)] == (0.125, 0.0)

    def test_it_starts_from_a_masked_autoencoder(self, tmp_path):
        mae = recipes.create("fmae", **SIZES, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
        torch.save({"model": mae.network.state_dict()}, tmp_path / "fmae.pth")
        recipe = self.make().float()
        recipes.load_weights(recipe, tmp_path / "fmae.pth")
        assert torch.equal(recipe.encoder.blocks[1].mlp.fc1.weight, mae.model.blocks[1].mlp.fc1.weight)
        batch = self.batch(recipe)
        want = mae.model.states(mae.images(ImageBatch(batch.images)), None, (1,))[0]
        torch.testing.assert_close(recipe.encode(batch), want)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reversal": -1.0}, "reversal must be at least 0"),
            ({"layer_decay": 0.0}, r"layer_decay in \(0, 1\]"),
            ({"units": 0}, "units and subjects must be at least 1"),
        ],
    )
    def test_refusals(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


def test_the_first_stage_is_mae():
    """Loss and all gradients, in float64."""
    torch.manual_seed(0)
    toy = {**SIZES, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": True}
    recipe = recipes.create("fmae", **toy).double()
    scatter(recipe)
    assert recipe.spec.training["crop_scale"] == (1.0, 1.0)

    def plain(recipe, view):
        plan = view.plan
        pred = autoencoder(parameters(recipe), "model.", recipe.model, view.parts, plan.ids_keep, plan.ids_restore)[1]
        target = patches(view.parts, (8, 8))
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(2)
        return {"pixels": (error * plan.mask).sum() / plan.mask.sum()}

    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    equal_to_reference(recipe, recipe.view(ImageBatch(images), seed=1), plain)


def test_reversal_hides_who_is_seen():
    """On shapes whose textures give them away, a probe of features finds less of the texture."""
    seen, other = (pictures(first, spurious) for first, spurious in ((0, True), (1000, False)))
    plain, turned = (probe(trained(seen, scale), seen, other) for scale in (1e-12, 0.5))
    assert turned < plain - 0.02  # 0.355 and 0.482; by chance 0.125


def pictures(first: int, spurious: bool) -> AnnotatedBatch:
    pixels, units, subjects = zip(*(shapes_on_texture(first + i, 32, 3, 8, spurious) for i in range(512)))
    images = torch.stack([torch.from_numpy(image) for image in pixels]).permute(0, 3, 1, 2).contiguous()
    return AnnotatedBatch(images, torch.stack([torch.from_numpy(there) for there in units]), torch.tensor(subjects))


def trained(data: AnnotatedBatch, scale: float):
    """150 steps without reversal, then 250 with a slow encoder, so that the head keeps up."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_path": 0.0}
    recipe = recipes.create("fmae_iat", units=3, subjects=8, reversal=1.0, **sizes)
    head = list(recipe.heads["subjects"].parameters())
    rest = [p for name, p in recipe.named_parameters() if p.requires_grad and not name.startswith("heads.subjects")]
    groups = [{"params": rest, "lr": 2e-3}, {"params": head, "lr": 3e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.999))
    order = torch.Generator().manual_seed(1)
    for step in range(400):
        if step == 150:
            groups = optimizer.param_groups
            groups[0]["lr"] = 2e-4
        recipe.reversal = 1e-12 if step < 150 else scale
        some = torch.randperm(512, generator=order)[:32]
        loss = recipe(AnnotatedBatch(data.images[some], data.units[some], data.subjects[some])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return recipe


@torch.no_grad()
def probe(recipe, seen: AnnotatedBatch, other: AnnotatedBatch) -> float:
    """Accuracy of a ridge regression of the subject."""
    x, y = (
        F.pad(recipe.norm(recipe.encode(data)[:, 1:].mean(1)).double(), (0, 1), value=1.0) for data in (seen, other)
    )
    weights = torch.linalg.solve(
        x.T @ x + 0.5 * torch.eye(x.shape[1]).double(), x.T @ F.one_hot(seen.subjects).double()
    )
    return (y @ weights).argmax(1).eq(other.subjects).double().mean().item()
