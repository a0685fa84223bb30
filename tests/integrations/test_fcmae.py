"""FCMAE on sparse layers, by structure; and the same parameters without MinkowskiEngine."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import maefast
from maefast.bench.peers.public.fcmae import small
from maefast.models import create
from maefast.models.convnames import fcmae_to_sparse, sparse_to_fcmae
from maefast.models.public_fcmae import PublicFCMAE, public_fcmae
from tests.integrations.common import Drawing, DropIn, gradient_error, relative

NAME = "facebookresearch/ConvNeXt-V2 FCMAE"


def images(dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 96, 96, dtype=dtype)


class TestFCMAE(DropIn):
    sweeps = True
    families = (NAME,)
    replaced = 4

    def make(self):
        return small(img_size=64)

    def inputs(self, dtype):
        return (torch.randn(3, 3, 64, 64, dtype=dtype),), {"mask_ratio": 0.6}

    def loss(self, out):
        return out[0]


def pair(drop_path: float = 0.0, **changes):
    torch.manual_seed(0)
    model = small(drop_path, **changes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model, maefast.accelerate(copy.deepcopy(model))


def run(function, *args, **kwargs):
    torch.manual_seed(1)
    random.seed(1)
    return function(*args, **kwargs)


def test_methods():
    model, fast = pair(norm_pix_loss=False)
    x = images()
    latent, mask = run(model.forward_encoder, x, 0.6)
    got, same = run(fast.forward_encoder, x, 0.6)
    assert torch.equal(mask, same)
    assert relative(got, latent) < 1e-12
    assert mask.sum(1).tolist() == [6, 6, 6]  # int(9 * 0.4) stay
    assert relative(fast.encoder(x, mask), latent) < 1e-12
    pred = model.forward_decoder(latent, mask)
    assert relative(fast.forward_decoder(latent, mask), pred) < 1e-12
    for flat in (pred, pred.flatten(2).transpose(1, 2)):
        assert relative(fast.forward_loss(x, flat, mask), model.forward_loss(x, flat, mask)) < 1e-12
    loss, pred, mask = run(fast, x, None, 0.25)
    for a, b in zip((loss, pred, mask), run(model, x, None, 0.25)):
        assert relative(a, b) < 1e-12


def test_ragged_masks_and_weights():
    """Samples may keep different numbers; a mask that is no mask goes through the model's own code."""
    model, fast = pair()
    x, mask = images(), torch.ones(3, 9)
    mask[0, :2] = mask[1, 3:] = mask[2, 4] = 0
    for given in (mask, mask * 0.5, torch.zeros(3, 9), torch.ones(3, 9)):
        assert relative(fast.encoder(x, given), model.encoder(x, given)) < 1e-12


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_extreme_ratios(ratio):
    (model, fast), x = pair(), images()
    for a, b in zip(run(fast, x, None, ratio), run(model, x, None, ratio)):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_drop_path_draws_the_same_numbers():
    model, fast = pair(0.4)
    x, outs, states = images(), [], []
    for net in (model, fast):
        outs.append(run(net, x))
        outs[-1][0].backward()
        states.append(random.getstate())
    assert states[0] == states[1]
    assert all(relative(b, a) < 1e-12 for a, b in zip(*outs))
    assert gradient_error(fast, model) < 1e-10


def test_hooks_see_what_they_saw():
    (model, fast), x = pair(), images()
    seen = []
    for net in (model, fast):
        block = net.encoder.stages[1][0]
        handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
        run(net, x)
        handle.remove()
    assert relative(seen[1], seen[0]) < 1e-12
    run(fast, x)
    assert len(seen) == 2


@pytest.mark.parametrize("names", [("bias",), ("weight", "bias")])
def test_norms_without_parameters(names):
    """All of them, after accelerate."""
    (model, fast), x = pair(), images()
    for net in (model, fast):
        for part in net.modules():
            if isinstance(part, torch.nn.LayerNorm):
                for name in names:
                    setattr(part, name, None)
    want, got = run(model, x), run(fast, x)
    for net, out in ((model, want), (fast, got)):
        net.zero_grad()
        out[0].backward()
    assert all(relative(b, a) < 1e-12 for a, b in zip(want, got))
    assert gradient_error(fast, model) < 1e-10
    assert "ran fast" in [note.runs for note in maefast.report(fast).notes if note.method == "forward"][-1]


@pytest.mark.filterwarnings("ignore:maefast")  # that a guard failed
def test_weights_that_draw():
    """Of sparse layers, the stem and parts of the decoder: none is read once more to look at it."""
    both, x = pair(), images()
    for chosen in ("encoder.stages.1.0.dwconv", "encoder.downsample_layers.0.0", "decoder.0.norm", "decoder.0.grn"):
        model, fast = copy.deepcopy(both)
        for net in (model, fast):
            part = net.get_submodule(chosen)
            for name in list(part._parameters):
                torch.nn.utils.parametrize.register_parametrization(part, name, Drawing())
        want, drawn = run(model, x), torch.get_rng_state()
        got = run(fast, x)
        assert all(relative(b, a) < 1e-12 for a, b in zip(want, got)), chosen
        assert torch.equal(torch.get_rng_state(), drawn), chosen


def test_a_ratio_of_none_is_refused():
    """It is no default."""
    for net in pair():
        with pytest.raises(TypeError):
            net(images(), None, None)
        with pytest.raises(TypeError):
            net(images(), mask_ratio=None)


def test_overrides_stay():
    class Shifted(PublicFCMAE):
        def gen_random_mask(self, x, mask_ratio):
            mask = torch.ones(len(x), 9)
            mask[:, 2:4] = 0
            return mask

    class Other(PublicFCMAE):
        def forward_loss(self, imgs, pred, mask):
            return super().forward_loss(imgs, pred, mask) * 2

    x = images()
    model, fast = pair(kind=Shifted)
    assert not maefast.report(fast).kept
    for a, b in zip(run(fast, x), run(model, x)):
        assert relative(a, b) < 1e-12
    model, fast = pair(kind=Other)
    assert {note.method or note.path for note in maefast.report(fast).kept} == {"forward_loss", "forward"}
    for a, b in zip(run(fast, x), run(model, x)):
        assert relative(a, b) < 1e-12


def test_wrong_input_raises_as_before():
    model, fast = pair()
    for bad in (torch.randn(2, 3, 80, 80).double(), torch.randn(2, 1, 96, 96).double(), torch.randn(2, 3, 96, 96)):
        with pytest.raises((RuntimeError, AssertionError)) as want:
            model(bad)
        with pytest.raises(type(want.value)):
            fast(bad)


# --- without MinkowskiEngine -------------------------------------------------------------------------------------


def test_public_names_and_shapes():
    """Of `tiny`, written out where sparse layers differ from dense ones."""
    with torch.device("meta"):
        state = {name: tuple(p.shape) for name, p in public_fcmae("tiny").state_dict().items()}
        dense = create("fcmae_convnextv2_tiny").state_dict()
    for name, shape in {
        "mask_token": (1, 512, 1, 1),
        "encoder.downsample_layers.0.0.weight": (96, 3, 4, 4),
        "encoder.downsample_layers.0.1.weight": (96,),
        "encoder.downsample_layers.3.0.ln.weight": (384,),
        "encoder.downsample_layers.3.1.kernel": (4, 384, 768),
        "encoder.downsample_layers.3.1.bias": (1, 768),
        "encoder.stages.2.8.dwconv.kernel": (49, 384),
        "encoder.stages.2.8.dwconv.bias": (1, 384),
        "encoder.stages.2.8.norm.ln.bias": (384,),
        "encoder.stages.2.8.pwconv1.linear.weight": (1536, 384),
        "encoder.stages.2.8.grn.gamma": (1, 1536),
        "encoder.stages.2.8.pwconv2.linear.bias": (384,),
        "proj.weight": (512, 768, 1, 1),
        "decoder.0.dwconv.weight": (512, 1, 7, 7),
        "decoder.0.grn.beta": (1, 1, 1, 2048),
        "pred.weight": (3072, 512, 1, 1),
    }.items():
        assert state[name] == shape, name
    assert state == {name: tuple(value.shape) for name, value in fcmae_to_sparse(dense).items()}
    assert {name: value.shape for name, value in sparse_to_fcmae(fcmae_to_sparse(dense)).items()} == {
        name: value.shape for name, value in dense.items()
    }


def test_equals_maefast_own_model():
    """The same weights under either names give the same loss and predictions."""
    model, fast = pair()
    own = maefast.models.FCMAE(96, 3, (1, 1, 2, 1), (8, 12, 16, 24), decoder_embed_dim=16, grn_scope="batch").double()
    own.load_state_dict(sparse_to_fcmae(model.state_dict()))
    x = images()
    loss, pred, mask = run(fast, x)
    want, rows, _ = own(x, mask=mask.bool(), pred="full")
    assert relative(loss, want) < 1e-12
    assert relative(pred.flatten(2).transpose(1, 2), rows) < 1e-12


def test_arguments_of_the_public_model():
    with pytest.raises(ValueError, match="choose from"):
        public_fcmae("gigantic")
    with pytest.raises(ValueError, match="cells of 32"):
        public_fcmae("atto", img_size=100)
