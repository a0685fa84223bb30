"""Which stage of a step a call belongs to, told by modules (their paths and classes), functions and ops.

A stage has an area (mask, embed, encoder, restore, decoder, loss, ...) and, where the area is an encoder, a decoder or
nothing that is known, a kind (attention, MLP, norms, conv, linear, activation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from .calls import OP, Call, is_product

DATA, HOST_TO_DEVICE, PREPARE, MASK, EMBED, ENCODER, RESTORE, DECODER, LOSS = (
    "data", "host to device", "prepare", "mask", "embed", "encoder", "restore", "decoder", "loss",
)  # fmt: skip
TEACHER, AUTOGRAD, OPTIMIZER, IDLE, OTHER = "teacher", "autograd", "optimizer", "device idle", "other"
ATTENTION, MLP, NORMS, CONV, LINEAR, ACTIVATION = "attention", "MLP", "norms", "conv", "linear", "activation"
KINDS = (ATTENTION, MLP, NORMS, CONV, LINEAR, ACTIVATION, OTHER)
HALVES = (ENCODER, DECODER, "")  # areas that have kinds


def order() -> list[str]:
    """Names of all stages, as a table shows them."""
    encoder, decoder, plain = ([f"{area} {kind}".strip() for kind in KINDS] for area in HALVES)
    first = [DATA, HOST_TO_DEVICE, PREPARE, TEACHER, MASK, EMBED]
    return [*first, *encoder, RESTORE, *decoder, *plain[:-1], LOSS, AUTOGRAD, OPTIMIZER, OTHER, IDLE]


@dataclass(frozen=True)
class Place:
    area: str = ""
    kind: str = ""

    @property
    def stage(self) -> str:
        return f"{self.area} {self.kind or OTHER}".strip() if self.area in HALVES else self.area

    def enter(self, area: str) -> Place:
        """The place inside, of an area that begins in this one."""
        inside = {PREPARE: (MASK, TEACHER, HOST_TO_DEVICE), EMBED: (MASK,)}  # and nothing else
        if self.area in _CLOSED or area not in inside.get(self.area, (area,)):
            return self
        if self.area == DECODER and area == EMBED:  # its linear map, its positions
            return self
        return self if area == self.area else Place(area)

    def turn(self, kind: str) -> Place:
        """The place of something of this kind inside."""
        whole = self.kind in (ATTENTION, MLP) and kind != NORMS  # what they are made of
        return self if whole or self.area not in HALVES else replace(self, kind=kind)


_CLOSED = (HOST_TO_DEVICE, TEACHER, MASK, RESTORE, LOSS, OPTIMIZER)  # nothing begins inside

# --- modules ------------------------------------------------------------------------------------------------

# Parts of the components of a module's path, the most telling first; the last two only beside a decoder.
_PATHS = (
    (TEACHER, re.compile(r"teacher|target_encoder|momentum")),
    (RESTORE, re.compile(r"^densify")),
    (DECODER, re.compile(r"decoder|predictor|regressor|rebuilder")),
    (EMBED, re.compile(r"^patch_embed|^embeddings?$|^tokenizer|^pos_embed$")),
    (ENCODER, re.compile(r"encoder|backbone|trunk|^vit$")),
    (ENCODER, re.compile(r"^blocks$|^layers?$|^(fc_|layer)?norm$|^stages$|^downsample_layers$|^stem$")),
    (DECODER, re.compile(r"^pred$|^proj$|^head$")),
)
_CLASSES = (
    (NORMS, re.compile(r"Norm|^GRN$")),
    (ATTENTION, re.compile(r"Attention|Attn|GATConv")),
    (MLP, re.compile(r"M[lL][pP]$|FeedForward|FFN|Intermediate$")),
    (CONV, re.compile(r"Conv\w*\d?d?$")),
    (LINEAR, re.compile(r"Linear$")),
)
_NAMES = dict.fromkeys(("attn", "self_attn", "attention"), ATTENTION)
_NAMES |= dict.fromkeys(("mlp", "ffn", "feed_forward"), MLP)
_ACTIVATIONS = {*nn.modules.activation.__all__, "GELUActivation", "NewGELUActivation"} - {"MultiheadAttention"}

# --- functions ----------------------------------------------------------------------------------------------

# By name, in whatever file: those of facebookresearch/mae, which its descendants kept.
_ANYWHERE = {
    "random_masking": MASK, "forward_encoder": ENCODER, "forward_decoder": DECODER, "forward_loss": LOSS,
}  # fmt: skip
# In maefast: (start of the path, name of the function or None for all, area).
_OURS = (
    ("masking/", None, MASK),
    ("ops/mask.py", None, MASK),
    ("ops/embed.py", "patch_embed", EMBED),
    ("ops/restore.py", None, RESTORE),
    ("ops/loss.py", None, LOSS),
    ("ops/feature_loss.py", None, LOSS),
    ("ops/chamfer.py", None, LOSS),
    ("nn/encoder.py", "_embed", EMBED),
    ("nn/encoder.py", "run_encoder", ENCODER),
    ("nn/encoder.py", "encoder_states", ENCODER),
    ("nn/decoder.py", "run_decoder", DECODER),
    ("nn/decoder.py", "decoder_states", DECODER),
    ("nn/cells.py", "dense", RESTORE),
    ("nn/teachers.py", "__call__", TEACHER),
    ("nn/teachers.py", "states", TEACHER),
    ("recipe.py", "to", HOST_TO_DEVICE),
    ("recipe.py", "prepared", PREPARE),
    ("optim.py", None, OPTIMIZER),
)
# The op families that a layer's kind follows from.
_FAMILIES = {
    "norm": NORMS, "cell_norm": NORMS, "_cell_norm_autograd": NORMS, "attention": ATTENTION,
    "_library_attention": ATTENTION, "sparse_conv": CONV, "implicit_conv": CONV, "depthwise": CONV,
    "conv_transpose": CONV, "gelu": ACTIVATION,
}  # fmt: skip
# In maefast/integrations, whose methods stand for those of a model.
_REPLACED = (
    (LOSS, re.compile(r"^_?score$|^forward_loss$|^loss$")),
    (MASK, re.compile(r"^draw$|^_plan$")),
    (RESTORE, re.compile(r"^_densify$")),
    (EMBED, re.compile(r"^_embed$|^embed_kept$|^embeddings_forward$")),
    (DECODER, re.compile(r"decode|predictor_forward$|^_predict$")),
    (ENCODER, re.compile(r"encode|^model_forward$|^forward_features$")),
)
_INTEGRATED = {
    "attend": ATTENTION,
    "cross": ATTENTION,
    "feed": MLP,
    "norm": NORMS,
    "last_norm": NORMS,
}  # functions of blocks
_OPTIMIZER = re.compile(r"torch/optim/|torch/nn/utils/clip_grad\.py$")
_LOSS = re.compile(r"(_loss|cross_entropy|kl_div)$")
_BACKWARD = {("torch/_tensor.py", "backward"), ("torch/autograd/__init__.py", "backward"),
             ("torch/autograd/__init__.py", "grad")}  # fmt: skip

# --- ops ----------------------------------------------------------------------------------------------------

_OPS = (
    (NORMS, re.compile(r"(layer|batch|group|instance|rms|add)_norm|segment_stats")),
    (ATTENTION, re.compile(r"scaled_dot_product|::attention|flash_attention|efficient_attention")),
    (CONV, re.compile(r"convolution|conv2d|::depthwise|halo_cells|implicit_conv")),
    (ACTIVATION, re.compile(r"::(gelu|bias_gelu|relu|silu|elu|leaky_relu|threshold|prelu|sigmoid|tanh)(_|$)")),
)


class Places:
    """The rules, for one model."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        parts = {part for path in self.paths.values() for part in path.split(".")}
        self.masked = any(_PATHS[2][1].search(part) for part in parts)  # has a decoder

    def inside(self, place: Place, call: Call) -> Place:
        """The place of a call, which is made in `place`."""
        if call.kind == OP:
            return self._op(place, call.name)
        if call.module is not None:
            return self._module(place, call)
        if not call.file:
            return place
        return self._function(place, call.file, call.function)

    def _module(self, place: Place, call: Call) -> Place:
        path = self.paths.get(call.module, "")
        area = self._area(path.split(".")) if path else None
        if area is not None:
            place = place.enter(area)
        last = path.rpartition(".")[2]
        if call.name.endswith("Loss"):
            return place.enter(LOSS)
        kind = next((kind for kind, pattern in _CLASSES if pattern.search(call.name)), None)
        kind = _NAMES.get(last, kind) if kind != NORMS else kind
        if kind is None and call.name in _ACTIVATIONS:
            kind = ACTIVATION
        return place if kind is None else place.turn(kind)

    def _area(self, parts: list[str]) -> str | None:
        for area, pattern in _PATHS if self.masked else _PATHS[:5]:
            if any(pattern.search(part) for part in parts):
                return area
        return None

    def _function(self, place: Place, file: str, function: str) -> Place:
        if (area := _ANYWHERE.get(function)) is not None:
            return place.enter(area)
        if _OPTIMIZER.search(file):
            return Place(OPTIMIZER)
        if file.endswith("torch/nn/functional.py"):
            return place.enter(LOSS) if _LOSS.search(function) else place
        _, found, path = file.rpartition("maefast/")
        if not found:
            return place
        if path.startswith("integrations/"):
            if path.startswith(("integrations/_layouts", "integrations/_attentions", "integrations/_layers")):
                return place.turn(_INTEGRATED[function]) if function in _INTEGRATED else place
            area = next((area for area, pattern in _REPLACED if pattern.search(function)), None)
            return place if area is None else place.enter(area)
        if path == "ops/_transformer_block.py":
            return _block(place, function)
        family = _FAMILIES.get(path.removeprefix("ops/").removesuffix(".py")) if path.startswith("ops/") else None
        if family is not None:
            return place.turn(family)
        for start, name, area in _OURS:
            if path.startswith(start) and name in (None, function):
                return place.enter(area)
        return place

    def _op(self, place: Place, name: str) -> Place:
        if _LOSS.search(name.removesuffix("_backward")):
            return place.enter(LOSS)
        kind = next((kind for kind, pattern in _OPS if pattern.search(name)), None)
        if kind is None:
            return place.turn(LINEAR) if is_product(name) and not place.kind else place
        return place.turn(kind) if kind == NORMS or place.kind in ("", OTHER, LINEAR, ACTIVATION) else place


def is_backward(call: Call) -> bool:
    """Whether the call is what walks back through the graph."""
    return any(call.function == name and call.file.endswith(file) for file, name in _BACKWARD)


# --- the fused block, whose forward and backward are one function each --------------------------------------


def _block(place: Place, function: str) -> Place:
    if function == "_through_mlp":
        return replace(place, kind=MLP) if place.area in HALVES else place
    return replace(place, kind=ATTENTION) if function == "_gradients" and place.area in HALVES else place


def parts_of_block(call: Call, place: Place) -> list[Place] | None:
    """Places of the calls inside the fused block's forward, which runs norm, attention, norm, MLP; None: it is another
    call."""
    if call.function != "_forward" or not call.file.endswith("ops/_transformer_block.py") or place.area not in HALVES:
        return None
    norms, places = 0, []
    for inner in call.calls:
        norm = _holds_norm(inner)
        norms += norm
        kind = NORMS if norm else ATTENTION if norms < 2 else MLP
        places.append(replace(place, kind=kind))
    return places


def _holds_norm(call: Call) -> bool:
    todo = [call]
    while todo:
        at = todo.pop()
        if at.kind == OP:
            return "::add_norm" in at.name
        todo += at.calls
    return False
