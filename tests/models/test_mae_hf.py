"""The model against Hugging Face's ViTMAEForPreTraining on copied weights and noise, and the conversion of names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from maefast.models import load_checkpoint
from maefast.models.convert import encoder_state, hf_to_mae, mae_to_hf
from tests.models.common import gradients, inputs, largest_error, small

transformers = pytest.importorskip("transformers")


def hf_config(model, **extra):
    c = model.config
    return transformers.ViTMAEConfig(
        image_size=c["img_size"][0],
        patch_size=c["patch_size"][0],
        num_channels=c["in_chans"],
        hidden_size=c["embed_dim"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["num_heads"],
        intermediate_size=int(c["embed_dim"] * c["mlp_ratio"]),
        decoder_hidden_size=c["decoder_embed_dim"],
        decoder_num_hidden_layers=c["decoder_depth"],
        decoder_num_attention_heads=c["decoder_num_heads"],
        decoder_intermediate_size=int(c["decoder_embed_dim"] * c["mlp_ratio"]),
        norm_pix_loss=c["norm_pix_loss"],
        layer_norm_eps=c["norm_eps"],  # HF's own default is 1e-12
        **extra,
    )


def layout() -> str:
    """The names that the installed transformers uses."""
    return "4" if int(transformers.__version__.split(".")[0]) < 5 else "5"


def hf_twin(model):
    """HF's model with our weights, position tables included: those of a fresh HF model are zero."""
    twin = transformers.ViTMAEForPreTraining(hf_config(model)).to(model.cls_token)
    twin.load_state_dict(mae_to_hf(model.state_dict(), layout()), strict=True)
    return twin


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", [{}, {"norm_pix_loss": True}, {"in_chans": 1}])
def test_loss_and_gradients(case, dtype, bound):
    model = small(dtype, **case)
    twin = hf_twin(model)
    images, noise = inputs(model)
    loss, pred, mask = model(images, 0.75, noise, pred="full")
    loss.backward()
    want = twin(images, noise=noise)
    want.loss.backward()
    assert loss.item() == pytest.approx(want.loss.item(), rel=bound / 10)
    assert torch.equal(mask, want.mask.float())
    assert ((pred - want.logits).norm() / want.logits.norm()).item() < bound
    wanted = hf_to_mae({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    error, name = largest_error(gradients(model), {k: wanted[k] for k in gradients(model)})
    assert error < bound, name


def test_features_of_hf_vit():
    """encode() gives the last hidden state of HF's ViT."""
    model = small()
    c = hf_config(model)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            **{k: getattr(c, k) for k in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")},
            num_attention_heads=c.num_attention_heads,
            intermediate_size=c.intermediate_size,
            layer_norm_eps=c.layer_norm_eps,
        ),
        add_pooling_layer=False,
    ).double()
    vit.load_state_dict(mae_to_hf(encoder_state(model.state_dict()), layout(), prefix=""), strict=True)
    images, _ = inputs(model)
    want = vit.eval()(images).last_hidden_state
    torch.testing.assert_close(model.encode(images), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", ["4", "5"])
def test_hf_loads_both_layouts_and_so_do_we(names, tmp_path):
    """HF itself reads what we write under either layout; and our loader reads that file back, bit for bit."""
    if names == "5" and layout() == "4":
        pytest.skip("transformers 4 does not know the names of 5")
    model = small(torch.float32)
    hf_config(model).save_pretrained(tmp_path)
    state = {k: v.contiguous() for k, v in mae_to_hf(model.state_dict(), names).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    twin = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    back = hf_to_mae(twin.state_dict())
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    other = load_checkpoint(small(torch.float32, seed=7), tmp_path / "model.safetensors")
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("names", ["4", "5"])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_round_trip_of_names(names, prefix):
    state = small(torch.float32).state_dict()
    back = hf_to_mae(mae_to_hf(state, names, prefix))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match=r"'head\.weight'"):
        mae_to_hf({"head.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="fc3"):
        mae_to_hf({"blocks.0.mlp.fc3.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="lm_head"):
        hf_to_mae({"lm_head.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="query, key and value"):
        hf_to_mae({"vit.layers.0.attention.q_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="layout"):
        mae_to_hf({}, "6")
    assert hf_to_mae({"pooler.dense.weight": torch.zeros(1)}) == {}
