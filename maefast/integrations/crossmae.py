"""CrossMAE (Fu et al., 2024): a decoder whose queries are the masked tokens, and whose keys the encoder gives.

Replaced are `forward` of every block with cross-attention (of any model: norms, attention and MLP fused), and of
`MaskedAutoencoderViT` `forward_encoder` (mask in one kernel, only visible patches embedded), `forward_decoder` (all
blocks in one run, what they attend to as whole rows) and `forward_loss` (no target tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _attentions as attentions
from maefast.integrations import _code, _swap, _worth, mae
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_timm as layouts
from maefast.integrations._steps import Options, Step, given
from maefast.integrations.transformer import WATCHED, Pending, is_fast, quicker, run_blocks, watched
from maefast.ops import TokenMask, _checks

NAME = "CrossMAE"
GAIN = "fused cross-attention; residual + norm, bias + GELU"  # of a block
METHODS = ("forward", "forward_encoder", "forward_decoder", "forward_loss", "random_masking", "patchify")
MODULES = ("patch_embed", "blocks", "decoder_blocks", "decoder_norm", "decoder_pred")
# Attributes that the forward of a block must use, those that it may use.
BLOCK = {"norm1", "cross_attn", "norm2", "mlp"}, {"training", "drop_path", "self_attn", "norm0"}
UNREAD = ("coords", "mask_ratio", "kept_mask_ratio")  # arguments of forward_decoder
# What our methods read at every call, see `Step.live`.
LIVE = ("norm0", "norm1", "norm2", "drop_path")
DECODER = frozenset((*(f"decoder_{name}" for name in ("pos_embed", "blocks", "norm", "pred")), "mask_token"))
DECODER |= {"dec_norms"}


def recognise(module: nn.Module) -> bool:
    return is_block(module) or _is_model(module)


def is_block(module: nn.Module) -> bool:
    attn = attentions.projections(getattr(module, "cross_attn", None), attentions.CROSS)
    norms = all(isinstance(getattr(module, name, None), nn.LayerNorm) for name in ("norm1", "norm2"))
    return attn is not None and norms and isinstance(getattr(module, "mlp", None), nn.Module)


def _is_model(module: nn.Module) -> bool:
    return (
        all(hasattr(module, name) for name in (*METHODS, "norm_pix_loss", "weight_fm"))
        and all(isinstance(getattr(module, name, None), nn.Module) for name in MODULES)
        and all(isinstance(getattr(module, name, None), Tensor) for name in mae.TENSORS)
        and isinstance(getattr(module.patch_embed, "proj", None), nn.Module)
        and any(map(is_block, module.decoder_blocks.children()))
    )


def steps(model: nn.Module, options: Options, keep: Callable[..., None]) -> Iterator[Step]:
    """What to replace; `keep(method, why)` notes what is not."""
    if is_block(model):
        yield from _block(model, keep)
        return
    for path, block in model.named_modules():  # first, so that the probes run through them; noted on their own
        if is_block(block):
            for step in _block(block, lambda *args, **kwargs: None):
                yield step.under(path)
    root = _swap.root_class(type(model), METHODS)
    kept = {name: _swap.overridden(model, name, root) for name in METHODS}
    embeds = layers.strided_patches(model.patch_embed.proj)
    sums = _sums(model)
    for name, fast, text, probe, live, reason in (
        (
            "forward_encoder",
            forward_encoder,
            "mask in one kernel, visible patches only embedded",
            lambda: model.forward_encoder(mae.probe_images(model), 0.75, 0.5),
            mae.ENCODER,
            embeds or kept["random_masking"],
        ),
        (
            "forward_decoder",
            forward_decoder,
            "queries of the masked tokens and all blocks in one run",
            lambda: model.forward_decoder(*_latent(model)),
            DECODER | {"wfm.linear" if sums else "wfm"},
            None,
        ),
        (
            "forward_loss",
            forward_loss,
            "pixels read in place, no target tensor",
            lambda: model.forward_loss(*_prediction(model)),
            frozenset(("patch_embed.proj",)),
            kept["patchify"] or _returned(model),
        ),
    ):
        if reason := kept[name] or reason:
            keep(name, reason, gain=text)
        else:
            yield Step(model, {name: fast}, {name: text}, probe, live, settings={"sums": sums})


def _sums(model: nn.Module) -> bool:
    """Whether the model's weighted sums of feature maps are those of the public code: one linear layer."""
    wfm = getattr(model, "wfm", None)
    known = isinstance(wfm, nn.Module) and isinstance(getattr(wfm, "linear", None), nn.Linear)
    return known and not _code.beyond(wfm, {"linear"}, {"training"})


def _returned(model: nn.Module) -> str | None:
    """Why the loss stays where the target is returned too, as later versions of the public code do."""
    count = _code.returns(type(model).forward_loss)
    return None if count is None else f"it returns {count} values, where maefast knows 1"


def _block(block: nn.Module, keep: Callable[..., None]) -> Iterator[Step]:
    """The step of a block with cross-attention, once."""
    if "forward" in _swap.methods(block):
        return
    reason = _swap.overriding(block, "forward")
    if reason is None and (found := _code.beyond(block, *BLOCK)):
        reason = f"its forward uses {found}, which maefast does not know"
    if reason:
        keep("", reason, gain=GAIN)
        return
    own = _own(block)
    settings = {
        "cross": attentions.known(block.cross_attn, attentions.CROSS),
        "self": None if own is None else attentions.known(own),
        "mlp": layouts.known_mlp(block.mlp),
    }
    live = [*LIVE, *attentions.live("cross_attn", block.cross_attn, settings["cross"])]
    live += [] if own is None else attentions.live("self_attn", own, settings["self"])
    live += layouts.live_mlp(block.mlp, settings["mlp"])
    text = {"": _text(block, settings)}
    yield Step(block, {"forward": forward}, text, lambda: block(*_tokens(block)), frozenset(live), (), False, settings)


def _own(block: nn.Module) -> nn.Module | None:
    """The attention of a block's queries to each other, if it has one: False stands in its place otherwise."""
    own = getattr(block, "self_attn", None)
    return own if isinstance(own, nn.Module) else None


def _text(block: nn.Module, settings: dict) -> str:
    own = _own(block)
    reason = attentions.problem(block.cross_attn, settings["cross"])
    reason = reason or (None if own is None else attentions.problem(own, settings["self"]))
    attention = "fused cross-attention" if reason is None else f"attention as it was, because {reason}"
    gelu = layers.gelu(layouts.activation(block.mlp, settings["mlp"]))
    return f"{attention}; residual + norm, {'MLP as it was' if gelu is None else 'bias + GELU'}"


# --- probes -------------------------------------------------------------------------------------------------


def _tokens(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Queries, and what gives the keys."""
    q, kv = (layers.inner_linear(getattr(block.cross_attn, name)).weight for name in ("q", "kv"))
    like = {"device": q.device, "dtype": q.dtype}
    return given(torch.randn(2, 5, q.shape[1], **like)), given(torch.randn(2, 7, kv.shape[1], **like))


def _mask(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(mask, ids_restore) as of `random_masking`, at other places in each sample; half of the tokens are predicted."""
    num_patches = model.pos_embed.shape[1] - 1
    ids_restore = torch.rand(2, num_patches, device=model.mask_token.device).argsort(1)
    return (ids_restore >= num_patches // 2).to(torch.get_default_dtype()), ids_restore


def _latent(model: nn.Module) -> tuple:
    like, count = model.pos_embed, 1
    if model.weight_fm:
        count = layers.inner_linear(model.wfm).weight.shape[1]
    shape = 2, 1 + (like.shape[1] - 1) // 4, like.shape[-1]
    maps = [given(torch.randn(shape, device=like.device, dtype=like.dtype)) for _ in range(count)]
    return maps if model.weight_fm else maps[0], *_mask(model), None, 0.75, 0.5


def _prediction(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, None]:
    images, (mask, _) = mae.probe_images(model), _mask(model)
    width = layers.inner_linear(model.decoder_pred).weight.shape[0]
    shape = len(mask), int(mask[0].sum()), width
    return images, given(torch.randn(shape, device=images.device, dtype=images.dtype)), mask, None


# --- the methods --------------------------------------------------------------------------------------------


def _usual(block: nn.Module, x: object, memory: object) -> bool:
    """Tokens that the kernels take; the block's own code answers for others, or refuses them."""
    if not is_block(block):
        return False
    parts = [layers.inner_linear(getattr(block.cross_attn, name)) for name in ("q", "kv")]
    if any(map(layers.parametrised, parts)):
        return False
    for t, weight in zip((x, memory), (part.weight for part in parts)):
        if not isinstance(t, Tensor) or not layers.plain_tensor(t) or t.layout is not torch.strided:
            return False
        if t.ndim != 3 or not t.numel() or not t.is_floating_point() or t.shape[-1] != weight.shape[1]:
            return False
        if t.device != weight.device or (t.dtype is not weight.dtype and _checks.autocast(t.device.type) is None):
            return False
    return len(x) == len(memory)


def _problem(block: nn.Module) -> str | None:
    own = _own(block)
    reason = None if own is None else attentions.problem(own, _swap.setting(block, "self"))
    return reason or attentions.problem(block.cross_attn, _swap.setting(block, "cross"))


def _run(block: nn.Module, x: Tensor, delta: Tensor | None, memory: Tensor) -> Pending:
    path = getattr(block, "drop_path", None)
    if (own := _own(block)) is not None:
        known = _swap.setting(block, "self")
        x, y = layers.norm(block.norm0, x, delta)
        y = own(y) if attentions.problem(own, known) else attentions.attend(own, known, y)
        delta = layers.then(y, path)
    attn, known = block.cross_attn, _swap.setting(block, "cross")
    x, y = layers.norm(block.norm1, x, delta)
    y = attn(y, memory) if attentions.problem(attn, known) else attentions.cross(attn, known, y, memory)
    x, y = layers.norm(block.norm2, x, layers.then(y, path))
    y = layouts.feed(block.mlp, layouts.activation(block.mlp, _swap.setting(block, "mlp")), y)
    return Pending(x, layers.then(y, path))


def forward(self: nn.Module, x: Tensor | Pending, y: Tensor, *args, **kwargs):
    if isinstance(x, Pending):
        return _run(self, *x, y)
    if args or kwargs or not _usual(self, x, y):
        return _swap.fall_back(self, "forward")(x, y, *args, **kwargs)
    if watched(self):
        return _swap.fall_back(self, "forward", WATCHED)(x, y)
    if reason := _left(self, x):
        return _swap.fall_back(self, "forward", reason)(x, y)
    return _run(self, x, None, y).value()


def forward_encoder(self: nn.Module, x: Tensor, mask_ratio: float, kept_mask_ratio: float, *args, **kwargs):
    usual = not args and not kwargs and mae.is_ratio(mask_ratio) and mae.is_ratio(kept_mask_ratio)
    if not usual or kept_mask_ratio > mask_ratio or not mae.usual(self, x) or not mae.embeds(self):
        return _swap.fall_back(self, "forward_encoder")(x, mask_ratio, kept_mask_ratio, *args, **kwargs)
    plan = mae.draw(self, x, mask_ratio)
    left = int(plan.num_tokens * (mask_ratio - kept_mask_ratio))  # neither visible nor predicted
    mask = (plan.ids_restore >= plan.keep + left).to(torch.get_default_dtype())
    proj = self.patch_embed.proj
    x = ops.patch_embed(x, proj.weight, proj.bias, plan, pos=self.pos_embed[:, 1:], prefix=self.cls_token)
    if not self.weight_fm:
        return layers.last_norm(self.norm, *run_blocks(self.blocks, x)), mask, plan.ids_restore, None
    maps = [x] if self.use_input else []
    for i, block in enumerate(self.blocks):
        x = block(x)
        if i in self.use_fm:
            maps.append(x)
    return maps, mask, plan.ids_restore, None


def _plan(model: nn.Module, mask: object) -> TokenMask | None:
    """Masked are the tokens that are predicted, in the order of their positions; None unless each sample has as many.
    Costs a host sync, as the model's own code does."""
    num_patches = model.decoder_pos_embed.shape[1] - 1
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != num_patches or not len(mask):
        return None
    mask = mask.bool()
    counts = mask.sum(1).tolist()
    if min(counts) != max(counts) or not counts[0]:
        return None
    return TokenMask.from_bool(mask, keep=num_patches - counts[0])


def forward_decoder(self: nn.Module, y: Tensor | list[Tensor], mask: Tensor, ids_restore: Tensor, *args, **kwargs):
    # What else it is given, coordinates and ratios, the original hands to nobody.
    plan = None if len(args) + len(kwargs) != 3 or set(kwargs) - set(UNREAD[len(args) :]) else _plan(self, mask)
    if plan is None or plan.device != self.decoder_pos_embed.device or len(ids_restore) != plan.batch:
        return _swap.fall_back(self, "forward_decoder")(y, mask, ids_restore, *args, **kwargs)
    at = Pending(self.decoder_pos_embed[0, 1:][plan.ids_masked] + self.mask_token)
    maps = _maps(self, y) if self.weight_fm else None
    for i, block in enumerate(self.decoder_blocks):
        memory = y if maps is None else self.dec_norms[i](maps[i])
        if is_fast(block, at.x) and _usual(block, at.x, memory) and not _left(block, at.x):
            at = block(at, memory)
        else:
            at = Pending(block(at.value(), memory))
    return layers.linear(self.decoder_pred, layers.norm(self.decoder_norm, *at)[1]), None


def _maps(model: nn.Module, y: list[Tensor]) -> tuple[Tensor, ...]:
    """What each decoder block attends to, [B, S, D]: weighted sums of the encoder's.

    The public code puts the maps side by side in the last dimension, where every read and every gradient of one is
    strided, and a gradient zeros those of all others first.
    """
    if _swap.setting(model, "sums") and isinstance(y, list):
        linear = model.wfm.linear
        if layers.plain_linear(linear) and linear.bias is None and len(y) == linear.weight.shape[1]:
            stacked = torch.stack(y)
            return (linear.weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).unbind(0)
    return model.wfm(y).unbind(-1)


def _left(block: nn.Module, x: Tensor) -> str | None:
    """Why the block runs as it was whatever it is given, or None."""
    problem = _problem(block) if _worth.needs_attention(x) else None
    return None if problem is None else quicker(problem)


def forward_loss(self: nn.Module, imgs: Tensor, pred: Tensor, mask: Tensor, coords: None, *args, **kwargs):
    plan = None if args or kwargs else _plan(self, mask)
    if plan is None or not _scores(self, imgs, pred, plan):
        return _swap.fall_back(self, "forward_loss")(imgs, pred, mask, coords, *args, **kwargs)
    return mae.score(self, imgs, layers.kept(pred), plan, "masked", "mean")


def _scores(model: nn.Module, images: object, pred: object, plan: TokenMask) -> bool:
    """Whether the loss is one that the kernel computes; what `patchify` refuses is left to it."""
    if not all(isinstance(t, Tensor) and t.device == plan.device for t in (images, pred)) or images.ndim != 4:
        return False
    side = layers.convolution(model.patch_embed.proj).kernel_size[0]
    height, width = images.shape[2:]
    if height != width or height % side or (height // side) ** 2 != plan.num_tokens or not images.is_floating_point():
        return False
    return tuple(pred.shape) == (len(images), plan.hide, side * side * images.shape[1]) and len(images) == plan.batch
