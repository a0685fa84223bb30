"""`ViTMAEForPreTraining` of the installed transformers, accelerated: parity, and whatever its callers may ask for."""

import copy
import inspect
import types
import warnings

import pytest
import torch
from torch import nn

import maefast
from maefast.integrations import _guards, _swap, hf_vitmae
from maefast.integrations.transformer import is_fast
from tests.integrations.common import DropIn, agree, both, gradient_error

transformers = pytest.importorskip("transformers")
FIVE = int(transformers.__version__.split(".")[0]) >= 5


def config(**changes):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 40,
        "norm_pix_loss": True,
    }
    return transformers.ViTMAEConfig(**{**small, **changes})


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.train()


def pair(kind=None, options=None, **changes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomised((kind or transformers.ViTMAEForPreTraining)(config(**changes)))
    return model, maefast.accelerate(copy.deepcopy(model), **(options or {}))


def images(batch=3, size=(32, 32), channels=3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(5))


def layers_of(model: nn.Module) -> nn.ModuleList:
    return hf_vitmae._layers_of(getattr(model, "vit", model))


class TestViTMAE(DropIn):
    sweeps = True
    families = (hf_vitmae.NAME,)
    replaced = 6

    def make(self):
        return transformers.ViTMAEForPreTraining(config()).train()

    def inputs(self, dtype):
        return (images().to(dtype),), {}

    def loss(self, out):
        return out.loss


class TestViTMAEModel(DropIn):
    """The encoder alone."""

    families = (hf_vitmae.NAME,)
    replaced = 4

    def make(self):
        return transformers.ViTMAEModel(config()).train()

    def inputs(self, dtype):
        return (images().to(dtype),), {}

    def loss(self, out):
        return 30 + (out.last_hidden_state * torch.linspace(-1, 1, 32)).sum(-1).square().mean()


# --- arguments ----------------------------------------------------------------------------------------------


def test_noise():
    models = pair()
    noise = torch.rand(3, 16)
    for given in (noise, noise.double()):
        want, got = both(models, images(), noise=given)
        agree(want, got)
        assert torch.equal(got.ids_restore, noise.argsort(1).argsort(1))
    state = torch.get_rng_state()
    models[1](images(), noise)
    assert torch.equal(state, torch.get_rng_state())


def test_a_decoder_called_with_any_order():
    """With tokens twice: the model gathers what it is told to."""
    models = pair()
    order = torch.rand(3, 16).argsort(1)
    order[0, 3] = order[0, 5]
    agree(*both([m.decoder for m in models], torch.randn(3, 5, 32), order))


def test_tuple():
    models = pair()
    for kwargs in ({"return_dict": False}, {"return_dict": None}, {"return_dict": True}):
        agree(*both(models, images(), **kwargs))
    agree(*both([m.vit for m in models], images(), return_dict=False))


@pytest.mark.parametrize("size", [(48, 48), (32, 32), (40, 48)])
def test_interpolation(size):
    models = pair()
    want, got = both(models, images(size=size), interpolate_pos_encoding=True)
    agree(want, got)
    want.loss.backward(), got.loss.backward()
    assert gradient_error(models[1], models[0]) < 1e-4


def test_hidden_states_and_attentions():
    models = pair(attn_implementation="eager")
    _guards._said.clear()
    for first in (True, False):
        want, got = both(models, images(), output_hidden_states=True)
        assert len(got.hidden_states) == len(want.hidden_states) == 3
        assert got.attentions is None
        agree(want, got)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            want, got = both(models, images(), output_attentions=True)
        assert len(got.attentions) == len(want.attentions) == 2
        agree(want, got)
        assert sum("attention weights" in str(w.message) for w in caught) == first
    # What transformers leaves behind at the layers does not slow down the next step, nor outlive `restore`.
    assert all(map(is_fast, layers_of(models[1])))
    agree(*both(models, images()))
    maefast.accelerate(models[1])
    assert not maefast.report(models[1]).kept
    maefast.restore(models[1])
    for layer, other in zip(layers_of(models[1]), layers_of(models[0])):
        assert type(layer) is type(other)
        assert not _swap.own(layer, "forward")
        assert "maefast" not in inspect.unwrap(layer.forward.__func__).__module__


def test_configured_outputs():
    models = pair()
    for model in models:
        model.config.output_hidden_states = True
    want, got = both(models, images())
    assert len(got.hidden_states) == 3
    agree(want, got)


def test_masks():
    """Attention masks (transformers 5) and head masks (4) go to the layers' own code."""
    models = pair(attn_implementation="eager")
    if FIVE:
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[:, 2] = 0
        agree(*both(models, images(), attention_mask=mask))
    else:
        agree(*both(models, images(), head_mask=torch.tensor([1.0, 0.0])))


def test_errors():
    models = pair()
    for bad in (images(size=(40, 40)), images(channels=2), images()[0], None):
        messages = []
        for model in models:
            with pytest.raises(Exception) as caught:  # noqa: PT011
                model(bad)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pred", ["full", "masked"])
def test_ratios(ratio, pred):
    models = pair(mask_ratio=ratio, options={"pred": pred})
    want, got = both(models, images())
    if ratio == 0:
        assert want.loss.isnan()
        assert got.loss.isnan()
    else:
        agree(want.loss, got.loss)
    agree(want.mask, got.mask)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_ratios(dynamic):
    """Of which torch.compile makes a symbol once they change."""
    model, fast = pair()
    torch.compiler.reset()
    compiled = torch.compile(fast, dynamic=dynamic, backend="aot_eager")
    for ratio in (0.75, 0.5, 0.25):
        model.config.mask_ratio = fast.config.mask_ratio = ratio
        want, got = both((model, compiled), images(), noise=torch.rand(3, 16))
        agree(want.loss, got.loss)


def test_on_meta():
    model, fast = (m.to("meta").eval() for m in pair())
    want, got = (m(images().to("meta")) for m in (model, fast))
    for a, b in zip(want.to_tuple(), got.to_tuple(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


# --- dtypes, loss, predictions ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_whole_bfloat16(norm):
    models = [m.bfloat16() for m in pair(norm_pix_loss=norm)]
    want, got = both(models, images().bfloat16(), noise=torch.rand(3, 16))
    agree(want, got, 3e-2)
    assert got.loss.dtype is torch.float32


def test_channels_and_plain_pixels():
    models = pair(num_channels=1, norm_pix_loss=False)
    want, got = both(models, images(channels=1))
    agree(want, got)


def test_masked_predictions():
    models = pair(options={"pred": "masked"})
    want, got = both(models, images())
    order = want.ids_restore.argsort(1)[:, 4:]
    assert got.logits.shape == (3, 12, 192)
    agree(want.logits.gather(1, order[..., None].expand(-1, -1, 192)), got.logits)
    agree(want.loss, got.loss)
    want.loss.backward(), got.loss.backward()
    assert gradient_error(models[1], models[0]) < 1e-4
    # The decoder itself keeps its contract; somebody who watches it sees what it always took and gave.
    agree(*both([m.decoder for m in models], torch.randn(2, 5, 32), torch.rand(2, 16).argsort(1)))
    seen = []
    models[1].decoder.register_forward_hook(lambda module, args, out: seen.append((args[1], out.logits)))
    again = both(models[1:], images())[0]
    agree(got.logits, again.logits)
    assert torch.equal(seen[0][0], want.ids_restore)
    assert seen[0][1].shape == (3, 16, 192)


@pytest.mark.skipif(FIVE, reason="forward_loss is a method of transformers 4")
def test_forward_loss():
    models = pair()
    pred, weights = torch.randn(3, 16, 192), torch.rand(3, 16)
    agree(*(m.forward_loss(images(), pred, weights) for m in models))
    assert "forward_loss" in _swap.methods(models[1])


# --- what transformers does with models ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    models = pair()
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert all(layer.gradient_checkpointing for layer in layers_of(model))
    runs = []
    inside = layers_of(models[1])[0].layernorm_after
    inside.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    want, got = both(models, images().requires_grad_(reentrant))
    agree(want, got)
    want.loss.backward(), got.loss.backward()
    assert len(runs) == 2, "each layer runs once more in the backward pass"
    assert gradient_error(models[1], models[0]) < 1e-4


def test_save_and_load(tmp_path):
    fast = pair()[1]
    fast.save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ViTMAEForPreTraining"]
    assert type(loaded) is transformers.ViTMAEForPreTraining
    agree(*both([loaded.eval(), fast.eval()], images()))
    again = type(fast).from_pretrained(tmp_path)
    agree(*both([again.eval(), fast], images()))


def test_signature():
    model, fast = pair()
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert inspect.signature(fast.vit.forward) == inspect.signature(model.vit.forward)


def test_dropout():
    """Layers that draw for each token are not shortened: the same numbers are drawn."""
    models = pair(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    assert not maefast.report(models[1]).kept
    want, got = both(models, images())
    agree(want, got)


# --- subclasses ---------------------------------------------------------------------------------------------


def test_overrides():
    class Louder(transformers.ViTMAEForPreTraining):
        def patchify(self, *args, **kwargs):
            return 2 * super().patchify(*args, **kwargs)

    class Silent(transformers.ViTMAEForPreTraining):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).loss

    for kind in (Louder, Silent):
        models = pair(kind)
        agree(*both(models, images()))
        kept = {n.method for n in maefast.report(models[1]).kept if not n.path}
        assert kept - {"forward_loss"} == {"forward"}


def test_overridden_parts():
    torch.manual_seed(0)
    model = randomised(transformers.ViTMAEForPreTraining(config()))

    def mask_the_end(self, sequence, noise=None):
        return type(self).random_masking(self, sequence, torch.arange(16.0).expand(len(sequence), -1))

    embeddings = model.vit.embeddings
    embeddings.random_masking = types.MethodType(mask_the_end, embeddings)
    decoder = model.decoder
    decoder.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), decoder)
    want = both([model], images())[0]
    assert want.mask[:, 4:].all()
    fast = maefast.accelerate(model)
    agree(want, both([fast], images())[0])
    kept = {f"{n.path}.{n.method}": n.text for n in maefast.report(fast).kept}
    assert kept == {
        "vit.embeddings.forward": "this object has its own random_masking",
        ".decoder.forward": "this object has its own forward",
    }


# --- position tables ----------------------------------------------------------------------------------------


def fresh() -> nn.Module:
    """As a constructor leaves it: transformers versions differ in which of the tables is zero."""
    model = transformers.ViTMAEForPreTraining(config())
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
        model.decoder.decoder_pos_embed.zero_()
    return model


def test_zero_tables_warn():
    assert not transformers.ViTMAEForPreTraining(config()).decoder.decoder_pos_embed.any(), "repaired upstream?"
    with pytest.warns(UserWarning, match="frozen and all zero") as caught:
        model = maefast.accelerate(fresh())
    texts = [str(w.message) for w in caught]
    assert any("decoder_pos_embed is frozen and all zero: all masked patches" in t for t in texts)
    assert any("position_embeddings is frozen and all zero: the encoder cannot tell" in t for t in texts)
    assert all("repair_positions=True" in t for t in texts)
    assert {n.method for n in maefast.report(model).kept} == {
        "decoder.decoder_pos_embed",
        "embeddings.position_embeddings",
    }
    assert not model.decoder.decoder_pos_embed.any()


def test_zero_tables_repaired():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = maefast.accelerate(fresh(), repair_positions=True)
    assert str(maefast.report(model)).count("was frozen and all zero: now the sine-cosine table") == 2
    # A decoder by itself is as its authors mean it: the layout of the pretrained weights.
    decoder = type(fresh().decoder)(config(), 16)
    torch.testing.assert_close(model.decoder.decoder_pos_embed, decoder.decoder_pos_embed, rtol=0, atol=1e-6)
    assert not model.decoder.decoder_pos_embed.requires_grad
    wide = type(decoder)(config(decoder_hidden_size=32), 16)
    torch.testing.assert_close(model.vit.embeddings.position_embeddings, wide.decoder_pos_embed, rtol=0, atol=1e-6)


def test_trained_tables_stay():
    model, fast = pair(options={"repair_positions": True})
    assert torch.equal(model.decoder.decoder_pos_embed, fast.decoder.decoder_pos_embed)


def halves(self, *args, **kwargs):
    out = super(type(self), self).forward(*args, **kwargs)
    if not self.on:
        return out
    return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("when", ["from the start, switched on later", "from the start, switched on", "put in later"])
def test_parts_of_another_class_in_a_layer(part, when):
    """With the same attributes and parameters; a switch says whether they compute something else."""
    model = randomised(transformers.ViTMAEForPreTraining(config()))
    fast = copy.deepcopy(model)

    def exchange(net, on):
        kind = type(getattr(net.vit.layers[0], part))
        new = type(kind.__name__, (kind,), {"forward": halves, "on": on})
        getattr(net.vit.layers[0], part).__class__ = new

    def switch(net):
        getattr(net.vit.layers[0], part).on = True

    if when.startswith("from the start"):
        for net in (model, fast):
            exchange(net, on=False)
            if not when.endswith("later"):
                switch(net)
    maefast.accelerate(fast)
    if when.endswith("later"):
        for net in (model, fast):
            exchange(net, on=True) if when.startswith("put") else switch(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, got = both((model, fast), images())
    agree(want, got)
    want.loss.backward()
    got.loss.backward()
    assert gradient_error(fast, model) < 1e-4
