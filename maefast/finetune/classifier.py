"""Classifiers of the encoders of `maefast.models`, from their own layers, so that the kernels of those serve them.

Stochastic depth is exact in them: `nn.Block` draws it for each sample and branch within its one op, ConvNeXt's and
ResNet's blocks have it as a layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from maefast.models import FCMAE, MaskedAutoencoder, MaskedAutoencoderViT, SparK
from maefast.models.convert import encoder_state
from maefast.models.convnames import convnext_to_timm
from maefast.models.convnext import ConvNeXt
from maefast.models.resnet import DEPTHS, ResNet
from maefast.models.spark import build_encoder
from maefast.nn import LayerNorm
from maefast.nn.encoder import run_blocks

HEAD_STD = 2e-5  # of MAE and ConvNeXt V2: all classes start about equally likely


class ViTClassifier(nn.Module):
    """The encoder of a ViT-MAE, the mean of its patches, a norm of its own and a linear head, as MAE is fine-tuned with
    `global_pool`. Names are timm's (``global_pool="avg"``). The positions learn too, as they do there.

    Args:
        model: its parts are taken over, not copied; its final norm is left out. classes: K.
        drop_path: rate of the last block, rising linearly from 0.
    """

    def __init__(self, model: MaskedAutoencoderViT, classes: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = model.cls_token, nn.Parameter(model.pos_embed.detach())
        self.patch_embed, self.blocks = model.patch_embed, model.blocks
        width, depth = model.cls_token.shape[-1], len(model.blocks)
        for index, block in enumerate(self.blocks):
            block.drop_path = drop_path * index / max(depth - 1, 1)
        self.fc_norm = LayerNorm(width, eps=model.norm.eps)
        self.head = nn.Linear(width, classes)
        init_head_(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K]."""
        lead, pos = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], 1)
        x, delta = run_blocks(self.blocks, self.patch_embed(images, pos=pos, prefix=self.cls_token + lead))
        x = x if delta is None else x + delta
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


def classifier_of(model: MaskedAutoencoder, classes: int, drop_path: float = 0.0) -> nn.Module:
    """The classifier of a model's encoder, images [B, C, H, W] -> logits [B, classes], with the model's weights and a
    fresh head.

    A ViT gives a `ViTClassifier`; SparK and FCMAE their ResNet (pool, head) or ConvNeXt (pool, norm, head).

    Raises:
        TypeError: a model of another kind, or a SparK around a net of the user's own.
    """
    if isinstance(model, MaskedAutoencoderViT):
        return ViTClassifier(model, classes, drop_path)
    if isinstance(model, FCMAE):
        config = model.config
        made: nn.Module = ConvNeXt(
            tuple(config["depths"]), tuple(config["widths"]), model.in_chans, drop_path, num_classes=classes
        )
    elif isinstance(model, SparK) and model.config is not None:
        made = _with_head(model.config["encoder"], model.in_chans, drop_path, classes)
    else:
        raise TypeError(f"mae_*, spark_* and fcmae_* models become classifiers, not a {type(model).__name__}")
    encoder, own = encoder_state(model.state_dict()), made.state_dict()
    made.load_state_dict({**own, **encoder}, strict=True)
    init_head_(head_of(made))
    return made


def _with_head(name: str, in_chans: int, drop_path: float, classes: int) -> nn.Module:
    if name in DEPTHS:
        return ResNet(DEPTHS[name], in_chans=in_chans, num_classes=classes, drop_path=drop_path)
    plain = build_encoder(name, in_chans, drop_path)
    depths = tuple(len(stage) for stage in plain.stages)
    return ConvNeXt(depths, tuple(plain.widths), in_chans, drop_path, grn_scope=None, num_classes=classes)


def head_of(network: nn.Module) -> nn.Linear:
    """The last layer of a classifier."""
    return network.fc if isinstance(network, ResNet) else network.head


def init_head_(head: nn.Linear) -> None:
    """Nearly zero, in place."""
    nn.init.trunc_normal_(head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
    nn.init.zeros_(head.bias)


def timm_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a classifier under timm's names, the head's too."""
    state = dict(network.state_dict())
    return convnext_to_timm(state) if isinstance(network, ConvNeXt) else state
