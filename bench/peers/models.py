"""The same masked autoencoder from different hands, on the same weights: peer name -> loss(images, noise)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maefast import models
from maefast.bench.peers import plain_sparse
from maefast.bench.peers.plain_mae import PlainMAE
from maefast.models.convert import mae_to_hf
from maefast.nn import Cells
from maefast.ops import CellMask

# The first is what the ratios are about; the others are what users have.
PEERS = (
    "maefast",
    "plain",
    "hf",
    "plain_compiled",
    "maefast_compiled",
    "plain_autotuned",
    "plain_cudagraphs",
    "maefast_graphed",
    "plain_graphed",
    "plain_cudnn",
)
# What a step is to be compared with on a GPU.
CUDA_PEERS = ("plain", "plain_autotuned", "plain_cudagraphs", "maefast_compiled", "maefast_graphed")
NAMES = {
    "maefast": "maefast",
    "plain": "plain eager model",
    "hf": "HF ViTMAE",
    "plain_compiled": "plain model, torch.compile",
    "maefast_compiled": "maefast, torch.compile",
    "plain_autotuned": "plain model, torch.compile (max-autotune-no-cudagraphs)",
    "plain_cudagraphs": "plain model, torch.compile (reduce-overhead)",
    "maefast_graphed": "maefast, step as one CUDA graph",
    "plain_graphed": "plain model, step as one CUDA graph",
    "plain_cudnn": "plain eager model, cuDNN's attention",
}
# Ending of a peer's name -> the mode of torch.compile.
MODES = {"compiled": None, "autotuned": "max-autotune-no-cudagraphs", "cudagraphs": "reduce-overhead"}
Loss = Callable[..., Tensor]
BATCHES = 2


@dataclass
class Task:
    """What a worker trains: loss(*inputs) for each inputs of `data` in turn; `notes` go into its answer. `graphed`: the
    whole step is captured by `maefast.graphed_step`."""

    model: nn.Module
    loss: Loss
    data: list[tuple[Tensor, ...]]
    notes: dict = field(default_factory=dict)
    graphed: bool = False


def variant(peer: str) -> tuple[str, str]:
    """("plain", "compiled") of "plain_compiled", ("plain", "") of "plain"."""
    base, _, ending = peer.partition("_")
    return base, ending


def load(peer: str, config: dict) -> None:
    """Import what `task` will need."""
    if peer == "hf":
        import transformers  # noqa: F401


def task(peer: str, *, config: dict, batch: int, device: str, part: str, tokens: int, mask_ratio: float) -> Task:
    """A peer with random images and noise, the same for all peers."""
    ending = variant(peer)[1]
    if ending in ("graphed", "cudagraphs") and device != "cuda":
        raise ValueError(f"CUDA graphs need --device cuda, and this is {device}")
    if ending == "graphed" and part != "step":
        raise ValueError("only a whole step is captured as one graph")
    model, loss = build(peer, config, mask_ratio, device, part)
    generator = torch.Generator().manual_seed(1)
    channels, (height, width) = config["in_chans"], config["img_size"]
    data = []
    for _ in range(BATCHES):
        images = torch.randn(batch, channels, height, width, generator=generator)
        noise = torch.rand(batch, tokens, generator=generator)
        data.append((images.to(device), noise.to(device)))
    return Task(model, loss, data, graphed=ending == "graphed")


def build(peer: str, config: dict, mask_ratio: float, device: str, part: str = "step") -> tuple[nn.Module, Loss]:
    """The module (for its parameters) and its loss. `config` is that of a maefast model; part "encoder" (of masked
    convnets) scores the encoder's maps alone, by the mean square of their active sites.

    Raises:
        ImportError: transformers is missing (peer "hf"). ValueError: unknown peer.
    """
    torch.manual_seed(0)  # every process draws the same weights
    if config["name"].startswith(("spark", "fcmae")):
        return _convnet(peer, config, mask_ratio, device, part)
    if part != "step":
        raise ValueError("only masked convnets are timed without their decoder")
    state = PlainMAE.from_config(config).state_dict()
    base, ending = variant(peer)
    if peer not in PEERS and ending not in ("", "graphed", *MODES):
        raise ValueError(f"unknown peer {peer!r}; choose from {', '.join(PEERS)}")
    if base == "hf":
        return _hf(config, state, mask_ratio, device)
    if base == "plain":
        model: nn.Module = PlainMAE.from_config(config)
    elif base == "maefast":
        model = models.create(**config)
    else:
        raise ValueError(f"unknown peer {peer!r}; choose from {', '.join(PEERS)}")
    model.load_state_dict(state, strict=True)
    model.to(device).train()
    call = torch.compile(model, dynamic=False, mode=MODES[ending]) if ending in MODES else model
    if ending != "cudnn":
        return model, lambda images, noise: call(images, mask_ratio, noise)[0]

    def cudnn(images: Tensor, noise: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return model(images, mask_ratio, noise)[0]

    return model, cudnn


def _hf(config: dict, state: dict[str, Tensor], mask_ratio: float, device: str) -> tuple[nn.Module, Loss]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    (height, width), (patch, patch_width) = config["img_size"], config["patch_size"]
    if height != width or patch != patch_width:
        raise ValueError("HF's ViTMAE takes square images and patches only")
    hf = ViTMAEConfig(
        image_size=height,
        patch_size=patch,
        num_channels=config["in_chans"],
        hidden_size=config["embed_dim"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        intermediate_size=int(config["embed_dim"] * config["mlp_ratio"]),
        decoder_hidden_size=config["decoder_embed_dim"],
        decoder_num_hidden_layers=config["decoder_depth"],
        decoder_num_attention_heads=config["decoder_num_heads"],
        decoder_intermediate_size=int(config["decoder_embed_dim"] * config["mlp_ratio"]),
        mask_ratio=mask_ratio,
        norm_pix_loss=config["norm_pix_loss"],
        layer_norm_eps=config["norm_eps"],
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(hf)
    layout = "4" if any(".encoder.layer." in key for key in model.state_dict()) else "5"
    model.load_state_dict(mae_to_hf(state, layout), strict=True)
    for name, parameter in model.named_parameters():
        # HF's own tables are frozen; so are the original's.
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            parameter.requires_grad_(config["positions"] == "learned")
    model.to(device).train()
    return model, lambda images, noise: model(pixel_values=images, noise=noise).loss


def _convnet(peer: str, config: dict, mask_ratio: float, device: str, part: str) -> tuple[nn.Module, Loss]:
    """A masked convnet, or the dense one times the mask, in channels-last memory."""
    base, ending = variant(peer)
    if base not in ("maefast", "plain"):
        raise ValueError(f"{NAMES.get(peer, peer)} has no masked convnet")
    ours = models.create(**config)
    model = ours if base == "maefast" else plain_sparse.build(ours).to(memory_format=torch.channels_last)
    model.to(device).train()
    if part == "encoder":
        call = _encoder_loss(ours, mask_ratio) if base == "maefast" else _plain_encoder_loss(model, mask_ratio)
        module = model.sparse_encoder
    else:
        module = model

        def call(images: Tensor, noise: Tensor) -> Tensor:
            return model(images, mask_ratio, noise)[0]

    if ending in MODES:
        call = torch.compile(call, dynamic=False, mode=MODES[ending])
    if base == "plain":
        return module, lambda images, noise: call(images.to(memory_format=torch.channels_last), noise)
    return module, call


def _encoder_loss(model: nn.Module, mask_ratio: float) -> Loss:
    def loss(images: Tensor, noise: Tensor) -> Tensor:
        plan = CellMask(model.plan(images, mask_ratio, noise), model.grid_size)
        return sum(x.rows.float().square().mean() for x in model.sparse_encoder(Cells.pack(images, plan)))

    return loss


def _plain_encoder_loss(model: nn.Module, mask_ratio: float) -> Loss:
    def loss(images: Tensor, noise: Tensor) -> Tensor:
        active = plain_sparse.draw(images, model.grid, round(noise.shape[1] * (1 - mask_ratio)), noise)
        share = active.float().mean()
        return sum(x.float().square().mean() / share for x in model.encode(images, active))

    return loss
