"""Layers of transformers with positions in their attention: options, calls that are not served, changes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import maefast
from maefast.integrations import _worth
from tests.integrations.common import gradient_error, relative, tensors
from tests.integrations.test_hf_positions import FIVE, SMALL, SWIN, made

if not FIVE:
    pytest.skip("transformers 4 keeps its layers elsewhere", allow_module_level=True)

TABLE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}
JEPA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32, "mlp_ratio": 2.0}
JEPA |= {"patch_size": 8, "frames_per_clip": 4, "pred_hidden_size": 32, "pred_num_attention_heads": 2}
JEPA |= {"pred_num_hidden_layers": 1}
MODELS = [("Beit", TABLE), ("Data2VecVision", TABLE | SHARED), ("DINOv3ViT", {}), ("VJEPA2", {}), ("SiglipVision", {})]
MODELS += [("Swin", {}), ("DonutSwin", {})]
SIZES = {"Swin": SWIN, "DonutSwin": SWIN, "VJEPA2": JEPA}


def pair(name: str, kind: str = "Model", **changes) -> tuple[nn.Module, nn.Module]:
    """(as it was, accelerated) in float64, with random weights."""
    torch.manual_seed(0)
    model = made(name, kind, **{**SIZES.get(name, SMALL), **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model = model.double()
    return model, accelerated(model)


def accelerated(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return maefast.accelerate(copy.deepcopy(model))


def inputs(name: str, batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    shape = (batch, 4, 3, *size) if name == "VJEPA2" else (batch, 3, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same(model: nn.Module, fast: nn.Module, x: Tensor, attention: bool | None = None, **kwargs) -> None:
    """Outputs, gradients and random draws, training and evaluating; `attention` alone may be in a mode of its own."""
    for training in (True, False):
        found = []
        for net in (model, fast):
            net.train(training).zero_grad()
            for part in net.modules():
                if attention is not None and "Attention" in type(part).__name__:
                    part.train(attention)
            torch.manual_seed(1)
            outs = [t for t in tensors(net(x, **kwargs)) if t.is_floating_point()]
            sum((t - 1).pow(2).mean() for t in outs).backward()
            found.append((outs, torch.get_rng_state()))
        (want, drawn), (got, also) = found
        assert torch.equal(drawn, also)
        for a, b in zip(got, want, strict=True):
            assert a.dtype is b.dtype
            assert relative(a, b) < 1e-11
        assert gradient_error(fast, model) < 1e-10


def served(fast: nn.Module) -> bool:
    """Whether every call of a layer since the last look ran fast."""
    report = maefast.report(fast)
    runs = [note.runs for note in report.replaced]
    return bool(runs) and not report.kept and all("ran fast" in run and "as it was" not in run for run in runs)


def text(fast: nn.Module) -> str:
    return str(maefast.report(fast))


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Beit", {}),
        ("Beit", {"layer_scale_init_value": 0.0}),
        ("Beit", TABLE | SHARED),
        ("Beit", TABLE | {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.3}),
        ("Beit", SHARED | {"attention_probs_dropout_prob": 0.3}),
        ("Beit", TABLE | {"attention_probs_dropout_prob": 0.3}),
        ("Data2VecVision", {}),
        ("Data2VecVision", TABLE | SHARED),
        ("Data2VecVision", SHARED | {"layer_scale_init_value": 0.0}),
        ("Data2VecVision", TABLE | {"attn_implementation": "eager"}),
        ("Data2VecVision", TABLE | {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}),
        ("Dinov2", {"use_swiglu_ffn": True, "drop_path_rate": 0.2}),
        ("Dinov2WithRegisters", {"use_swiglu_ffn": True, "num_register_tokens": 2}),
        ("IJepa", {}),
        ("DINOv3ViT", {"query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False}),
        ("DINOv3ViT", {"attention_dropout": 0.3, "num_register_tokens": 2}),
        ("DINOv3ViT", {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}),
        ("VJEPA2", {"hidden_size": 72, "attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.3}),
        ("VJEPA2", {"hidden_size": 72, "qkv_bias": False}),
        ("SiglipVision", {"attention_dropout": 0.3}),
        ("CLIPVision", {}),
        ("Swin", {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.2}),
        ("Swin", {"attention_probs_dropout_prob": 0.3, "qkv_bias": False}),
        ("Swin", {"window_size": 4}),
        ("Swin", {"hidden_act": "relu"}),
        ("DonutSwin", {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.2}),
        ("DonutSwin", {"attention_probs_dropout_prob": 0.3, "qkv_bias": False}),
    ],
    ids=str,
)
def test_options(name, options):
    """Dropout inside the attention runs the model's own, with the same draws, and the rest of the layer fast."""
    model, fast = pair(name, **options)
    same(model, fast, inputs(name))
    assert served(fast), text(fast)


@pytest.mark.parametrize("name", [*SIZES, "Beit", "DINOv3ViT", "SiglipVision", "ViT"])
def test_attention_in_a_mode_of_its_own(name):
    """Monte-Carlo dropout: the attention draws in a model that evaluates, or does not in one that trains."""
    rate = "attention_dropout" if name in ("DINOv3ViT", "SiglipVision") else "attention_probs_dropout_prob"
    model, fast = pair(name, **{rate: 0.3})
    for training in (True, False):
        same(model, fast, inputs(name), attention=training)
        assert served(fast), text(fast)


def test_tables_of_other_sizes():
    for name, options in (("Beit", TABLE), ("Beit", SHARED), ("Data2VecVision", TABLE)):
        model, fast = pair(name, **options)
        same(model, fast, inputs("Beit", size=(48, 32)))
        same(model, fast, inputs("Beit", batch=1))
        assert served(fast), text(fast)
        same(model, fast, inputs("Beit"), interpolate_pos_encoding=True)


@pytest.mark.parametrize("size", [(32, 48), (24, 40), (16, 16)])
def test_rotations_of_other_sizes(size):
    model, fast = pair("DINOv3ViT")
    same(model, fast, inputs("", size=size))
    assert served(fast), text(fast)


@pytest.mark.parametrize("size", [(32, 48), (28, 44), (60, 32)])
def test_windows_of_other_sizes(size):
    model, fast = pair("Swin")
    same(model, fast, inputs("Swin", size=size), interpolate_pos_encoding=True)
    assert served(fast), text(fast)


def test_windows_as_large_as_the_grid():
    """The block writes that it no longer shifts, and so does ours."""
    model, fast = pair("Swin", window_size=4)
    same(model, fast, inputs("Swin"))
    for a, b in zip(model.encoder.layers[1].blocks, fast.encoder.layers[1].blocks):
        assert (a.shift_size, a.window_size) == (b.shift_size, b.window_size) == (0, 4)
    assert served(fast), text(fast)


def test_without_a_kernel_layers_run_as_they_were(monkeypatch):
    """With positions alone."""
    for name, options in MODELS:
        plain = name == "SiglipVision"
        monkeypatch.setattr(_worth, "no_kernel", lambda *args: None)
        model, fast = pair(name, **options)
        monkeypatch.setattr(_worth, "no_kernel", lambda *args: "there is none")
        same(model, fast, inputs(name))
        assert served(fast) is plain
        assert ("because there is none, and without a fused" in text(fast)) is not plain
        assert ("as it was with positions, because there is none" in text(accelerated(model))) is not plain
    for name in ("Beit", "Data2VecVision"):
        model, fast = pair(name)
        same(model, fast, inputs(name))
        assert served(fast), text(fast)


def test_what_the_table_says_of_kernels():
    """Of a kind of call that only the reference serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_worth, "_always", False)
        assert "float64, heads of 64, on a CPU" in _worth.no_kernel("cpu", torch.float64, 64, 197)
        with maefast.backend("reference"):
            assert _worth.no_kernel("cpu", torch.float64, 64, 197) is None
    assert _worth.no_kernel("cpu", torch.float64, 64, 197) is None


# --- calls that are not served ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Beit", "DINOv3ViT", "SiglipVision", "Swin"])
def test_hidden_states_and_attentions(name):
    model, fast = (net.eval() for net in pair(name, attn_implementation="eager"))
    for wanted in ({"output_hidden_states": True}, {"output_attentions": True}):
        want, got = model(inputs(name), **wanted), fast(inputs(name), **wanted)
        assert len(tensors(want)) == len(tensors(got)) > 1
        for a, b in zip(tensors(got), tensors(want)):
            assert relative(a, b) < 1e-6  # its softmax is of float32


@pytest.mark.parametrize("name", ["VJEPA2", "Swin"])
def test_layers_that_return_their_weights(name):
    model, fast = pair(name, attn_implementation="eager")
    assert "it returns the attention weights" in text(fast)
    same(model, fast, inputs(name))
    model, fast = pair(name)
    for net in (model, fast):
        net.config._attn_implementation = "eager"
    same(model, fast, inputs(name))


def test_a_mask_of_samples():
    """Not the bias of all samples: the layer runs as it was."""
    model, fast = pair("Beit", **SHARED)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, 9:] = False
    for net in (model, fast):
        net.eval()
    want, got = (net(inputs("Beit"), attention_mask=mask).last_hidden_state for net in (model, fast))
    assert torch.equal(got, want)
    assert "called with attention_mask" in text(fast)


@pytest.mark.parametrize("name", ["Beit", "DINOv3ViT", "SiglipVision"])
@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (1, 2, 7, 7), (2, 2, 7, 7)])
def test_masks_of_one_layer(name, shape):
    """Of any shape, with rows that rule out every key: the answer is the model's own."""
    model, fast = pair(name)
    layer, quick = (next(m for m in net.modules() if type(m).__name__.endswith("Layer")) for net in (model, fast))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    angles = torch.randn(5, 8, dtype=torch.float64).tile(2)
    call = {"position_embeddings": (angles.cos(), angles.sin())} if name == "DINOv3ViT" else {}
    for ruled_out in (slice(0, 0), slice(3, 5), slice(None)):
        mask = torch.randn(shape, dtype=torch.float64)
        mask[:, :, 2, ruled_out] = torch.finfo(torch.float64).min
        assert relative(quick(x, attention_mask=mask, **call), layer(x, attention_mask=mask, **call)) < 1e-12


def test_arguments_in_their_places():
    model, fast = pair("Beit", **TABLE)
    layer, quick = model.layers[0], fast.layers[0]
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    assert relative(quick(x, None, False, (32, 32)), layer(x, None, False, (32, 32))) < 1e-12
    assert relative(quick(x, None, resolution=(32, 32)), layer(x, None, resolution=(32, 32))) < 1e-12
    assert "ran fast 2 times" in text(fast)
    for args in ((x,), (x, None, False, (48, 48)), (x, None, False, (32, 32), 1)):
        for net in (layer, quick):
            with pytest.raises((TypeError, RuntimeError)):
                net(*args)
    model, fast = pair("DINOv3ViT")
    for net in (model, fast):
        with pytest.raises(TypeError):
            net.model.layer[0](x)


def test_rotations_with_gradients():
    """Tables that somebody learns: the layer runs as it was, and gives their gradients."""
    model, fast = pair("DINOv3ViT")
    x, found = torch.randn(2, 7, 32, dtype=torch.float64), []
    for net in (model, fast):
        angles = torch.linspace(0, 1, 80, dtype=torch.float64).view(5, 16).requires_grad_()
        net.model.layer[0](x, position_embeddings=(angles.cos(), angles.sin())).pow(2).sum().backward()
        found.append(angles.grad)
    assert relative(*found) < 1e-12


def test_places_of_each_sample():
    """Positions of V-JEPA 2's predictor, in any order; of another type the model answers or refuses itself."""
    model, fast = pair("VJEPA2")
    layer, quick = model.encoder.layer[0], fast.encoder.layer[0]
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    places = torch.stack([torch.randperm(32)[:9] for _ in range(3)])
    for ids in (places, places[:1].expand(3, -1), places.int(), places.double()):
        assert relative(quick(x, ids)[0], layer(x, ids)[0]) < 1e-12
        assert quick(x, position_mask=ids)[1] is None


# --- what somebody does to a layer --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_hooks_inside_see_what_they_saw(name, options):
    model, fast = pair(name, **options)
    layers = [n for n, m in model.named_modules() if type(m).__name__.endswith("Layer") and "0" in n.split(".")]
    inside = [n for n, _ in model.named_modules() if n.startswith(f"{layers[0]}.")]
    assert len(inside) > 6
    for path in inside:
        found = []
        for net in (model.eval(), fast.eval()):
            seen = []
            handle = net.get_submodule(path).register_forward_hook(
                lambda module, args, out, seen=seen: seen.extend(tensors((args, out)))
            )
            net(inputs(name))
            handle.remove()
            found.append(seen)
        for a, b in zip(*found, strict=True):
            assert relative(b, a) < 1e-11, path


class LowRank(nn.Module):
    """An adapter in the place of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(name, options, when):
    """The attention is called with its positions where a projection is adapted."""
    model, fast = pair(name, **options)
    if when == "before":
        maefast.restore(fast)
    linears = [
        n for n, m in model.named_modules() if type(m) is nn.Linear and "Layer" in type(_layer(model, n)).__name__
    ]
    for path in linears[:6]:
        for net in (model, fast):
            torch.manual_seed(3)
            parent, _, last = path.rpartition(".")
            setattr(net.get_submodule(parent), last, LowRank(net.get_submodule(path)))
    if when == "before":
        fast = accelerated(fast)
    same(model, fast, inputs(name))
    assert served(fast), text(fast)


def _layer(model: nn.Module, path: str) -> nn.Module:
    """The module two steps above."""
    return model.get_submodule(".".join(path.split(".")[:-2]))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 2])
def test_layer_scale_that_is_a_number(value):
    model, fast = pair("Beit", layer_scale_init_value=0.0)
    for net in (model, fast):
        net.layers[0].lambda_1 = value
        net.layers[1].lambda_2 = value
    same(model, fast, inputs("Beit"))


def test_a_table_that_goes_or_comes():
    model, fast = pair("Beit", **TABLE)
    for net in (model, fast):
        net.layers[0].relative_position_bias = None
        net.layers[1].relative_position_bias = copy.deepcopy(net.layers[1].relative_position_bias)
        with torch.no_grad():
            net.layers[1].relative_position_bias.relative_position_bias_table.mul_(3)
    same(model, fast, inputs("Beit"))


def test_copies_and_frozen_tables():
    for name, options in MODELS:
        model, fast = pair(name, **options)
        other = copy.deepcopy(fast)
        for net in (model, other):
            for path, p in net.named_parameters():
                p.requires_grad_("bias_table" not in path and "q_proj" not in path and "query" not in path)
        same(model, other, inputs(name))
        assert list(model.state_dict()) == list(fast.state_dict())
        assert served(other), text(other)


def test_swin_v2_is_declined():
    model = made("Swinv2", **SWIN).eval()
    with pytest.warns(UserWarning, match="nothing to accelerate") as warned:
        fast = maefast.accelerate(copy.deepcopy(model))
    assert "by their cosine (self.logit_scale), and maefast does not" in str(warned[0].message)
    x = inputs("Swin").float()
    assert torch.equal(fast(x).last_hidden_state, model(x).last_hidden_state)


def test_a_layer_with_arguments_that_nobody_knows():
    """The report names them, and no text of an exception strays into it."""
    model, _ = pair("SiglipVision")

    def forward(self, hidden_states, attention_mask, windows):
        return hidden_states * windows

    plain = type("PlainLayer", (nn.Module,), {"forward": forward, "__module__": __name__})()
    vars(plain).update(vars(model.encoder.layers[0]))
    with pytest.warns(UserWarning, match="its forward wants windows, which maefast does not know"):
        fast = maefast.accelerate(nn.Sequential(plain))
    assert "Error" not in text(fast)
