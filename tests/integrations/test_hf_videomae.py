"""`VideoMAEForPreTraining` of the installed transformers, accelerated: parity, odd masks, constant tables."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import maefast
from maefast.integrations import _guards, _hf, _swap, hf_videomae
from maefast.integrations.transformer import is_fast
from maefast.ops import TokenMask
from tests.integrations.common import DropIn, agree, both, gradient_error, relative, tensors

transformers = pytest.importorskip("transformers")

TOKENS = 2 * 4 * 4


def config(**changes):
    small = {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
        "tubelet_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 40,
        "use_mean_pooling": False,
    }
    return transformers.VideoMAEConfig(**{**small, **changes})


def videos(channels=3) -> torch.Tensor:
    return torch.randn(3, 4, channels, 32, 32, generator=torch.Generator().manual_seed(5))


def mask(*visible) -> torch.Tensor:
    """True = masked, as many visible tubelets in each video as said."""
    noise = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(6))
    return noise.argsort(1).argsort(1) >= torch.tensor(visible or (6,))[:, None]


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.train()


def pair(kind=None, **changes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomised((kind or transformers.VideoMAEForPreTraining)(config(**changes)))
    return model, maefast.accelerate(copy.deepcopy(model))


class TestVideoMAE(DropIn):
    sweeps = True
    families = (hf_videomae.NAME,)
    replaced = 6

    def make(self):
        return transformers.VideoMAEForPreTraining(config()).train()

    def inputs(self, dtype):
        return (videos().to(dtype),), {"bool_masked_pos": mask()}

    def loss(self, out):
        return out.loss


class TestClassification(DropIn):
    sweeps = True
    """All tokens, no mask: fine-tuning."""

    families = (hf_videomae.NAME,)
    replaced = 4

    def make(self):
        return transformers.VideoMAEForVideoClassification(config(use_mean_pooling=True, num_labels=5)).train()

    def inputs(self, dtype):
        return (videos().to(dtype),), {"labels": torch.tensor([0, 3, 1])}

    def loss(self, out):
        return out.loss


class TestGrey(TestVideoMAE):
    """Of other channels than three the pixels are scored as they are."""

    sweeps = False

    def make(self):
        return transformers.VideoMAEForPreTraining(config(num_channels=1)).train()

    def inputs(self, dtype):
        return (videos(1).to(dtype),), {"bool_masked_pos": mask()}


# --- masks --------------------------------------------------------------------------------------------------


def test_one_sync(monkeypatch):
    made = []
    original = TokenMask.from_bool
    monkeypatch.setattr(TokenMask, "from_bool", staticmethod(lambda m: made.append(m) or original(m)))
    models = pair()
    made.clear()
    agree(*both(models, videos(), mask()))
    assert len(made) == 1


def test_uneven_masks():
    """What the model makes of them is for the model to say: nonsense where the counts divide, else an error."""
    models = pair()
    agree(*both(models, videos(), mask(4, 6, 8)))
    for bad in (mask(4, 6, 7), None, mask()[:2], mask().long(), mask()[:, :-1], mask(0, 0, 0), mask(32, 32, 32)):
        seen = []
        for model in models:
            try:
                seen.append(tensors(model(videos(), bool_masked_pos=bad)))
            except Exception as error:
                seen.append((type(error), str(error)))
        if isinstance(seen[0], list):
            assert all(torch.allclose(a, b, atol=1e-4, equal_nan=True) for a, b in zip(*seen))
        else:
            assert seen[0] == seen[1]


def test_encoder_with_mask():
    models = pair(transformers.VideoMAEModel)
    agree(*both(models, videos(), mask()))
    agree(*both(models, videos(), mask(32)))
    agree(*both(models, videos()))
    with pytest.raises(ValueError, match="channel dimension"):
        models[1](videos(channels=2), mask())


def test_watched_encoder():
    """Somebody who watches a part sees what it always took."""
    models = pair()
    seen = []
    models[1].videomae.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    agree(*both(models, videos(), mask()))
    assert torch.equal(seen[0], mask())


# --- loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "norm"), [(3, False), (1, True), (4, True)])
def test_targets(channels, norm):
    models = pair(num_channels=channels, norm_pix_loss=norm)
    assert not maefast.report(models[1]).kept
    want, got = both(models, videos(channels), mask())
    agree(want, got)
    want.loss.backward(), got.loss.backward()
    assert gradient_error(models[1], models[0]) < 1e-4


def test_refused_target():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pair(num_channels=1, norm_pix_loss=False)
    for model in models:
        with pytest.raises(ValueError, match="Can't unnormalize non-RGB images"):
            model(videos(1), mask())


def test_no_gradient_through_the_target():
    models = pair()
    grads = []
    for model in models:
        x = videos().requires_grad_()
        model(x, mask()).loss.backward()
        grads.append(x.grad)
    assert relative(grads[1], grads[0]) < 1e-4


def test_whole_bfloat16():
    models = [m.bfloat16() for m in pair()]
    agree(*both(models, videos().bfloat16(), mask()), 5e-2)


# --- arguments and what transformers does -------------------------------------------------------------------


def test_tuple():
    models = pair()
    for kwargs in ({"return_dict": False}, {"return_dict": None}):
        agree(*both(models, videos(), mask(), **kwargs))


def test_hidden_states_and_attentions():
    models = pair(attn_implementation="eager")
    _guards._said.clear()
    for first in (True, False):
        want, got = both(models, videos(), mask(), output_hidden_states=True)
        assert len(got.hidden_states) == 3
        agree(want, got)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            want, got = both(models, videos(), mask(), output_attentions=True)
        assert len(got.attentions) == 2
        agree(want, got)
        assert sum("attention weights" in str(w.message) for w in caught) == first
    assert all(map(is_fast, models[1].videomae.encoder.layer))
    agree(*both(models, videos(), mask()))
    maefast.restore(models[1])
    assert not any(_swap.own(layer, "forward") for layer in models[1].videomae.encoder.layer)


@pytest.mark.parametrize("bias", [True, False])
def test_biases(bias):
    """Queries and values have one, keys never."""
    models = pair(qkv_bias=bias, qv_bias=bias)
    assert not maefast.report(models[1]).kept
    want, got = both(models, videos(), mask())
    agree(want, got)
    want.loss.backward(), got.loss.backward()
    assert gradient_error(models[1], models[0]) < 1e-4


def test_tables_stay_plain_tensors():
    model, fast = pair()
    assert list(dict(fast.named_buffers())) == []
    assert type(fast.position_embeddings) is torch.Tensor
    with torch.no_grad():
        for net in (model, fast):
            net.position_embeddings.mul_(2)
            net.videomae.embeddings.position_embeddings = net.videomae.embeddings.position_embeddings * 3
    agree(*both((model, fast), videos(), mask()))


def test_moved_tables():
    """A table is copied to another device once, and again when it changes."""
    table, like = torch.randn(3, 2), torch.zeros(1, device="meta")
    first = _hf.moved(table, like, torch.float32)
    assert first.device.type == "meta"
    assert _hf.moved(table, like, torch.float32) is first
    assert _hf.moved(table, like, torch.bfloat16).dtype is torch.bfloat16
    table.mul_(2)
    assert _hf.moved(table, like, torch.float32) is not first


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(when):
    """Also the reentrant kind, which refuses the gradients of the comparison and is set aside meanwhile."""
    models = pair()
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": True})
    if when == "before":
        maefast.accelerate(models[1])
        assert not maefast.report(models[1]).kept
        assert "computes something else" not in str(maefast.report(models[1]))
    want, got = both(models, videos(), mask())
    agree(want, got)
    want.loss.backward(), got.loss.backward()
    assert gradient_error(models[1], models[0]) < 1e-4


def test_dropout():
    agree(*both(pair(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1), videos(), mask()))


def test_save_and_load(tmp_path):
    fast = pair()[1]
    fast.save_pretrained(tmp_path)
    loaded = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["VideoMAEForPreTraining"]
    agree(*both([loaded.eval(), fast.eval()], videos(), mask()))


def test_signature():
    model, fast = pair()
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)


def test_overrides():
    class Halved(transformers.VideoMAEForPreTraining):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = out.loss / 2
            return out

    models = pair(Halved)
    agree(*both(models, videos(), mask()))
    assert [n.text for n in maefast.report(models[1]).kept] == [
        "Halved.forward overrides that of VideoMAEForPreTraining"
    ]


def test_saving_changes_nothing(tmp_path):
    """`save_pretrained` writes a dtype into the configuration, whose name the forward asks of tensors."""
    fast = pair()[1]
    fast.save_pretrained(tmp_path)
    fast(videos(), mask())
    assert "as it was" not in str(maefast.report(fast))
