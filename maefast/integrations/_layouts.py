"""Layouts of pre-norm transformer blocks: where a block keeps its parts, and when each of them may be fused.

A layout is a class of functions of a block: `fits` (is it one), `norms`, `attend` (the first branch, from the normed
tokens to what is added to them; `count` asks for the last tokens only), `feed` (the second), `whole` (the block as one
op, if all of its parts are what they look like), `passes` (whether a call with further arguments is the plain one),
`problem` (why the attention runs as it was).

Some have more. `unknown`: why a block is kept before anything is compared. `settings`: what is found once and kept on
the block. `arguments`: names of further arguments that it understands. `positions`: what these say about positions, as
`common.Positions`, or None for a call that is not served; handed to `attend` and `whole`. `placed`: whether a call says
something about them, where not all do. `no_kernel`: why one that does is not served here. `calls`: further arguments of
the calls that are compared. `returns_pair`: whether the block returns (tokens, attention weights).

    file             blocks of
    _layouts_timm    timm, MAE, VideoMAE, DeiT, JEPA, lightly
    _layouts_eva     timm with positions in the attention: EVA-02 and others with rope, tables of relative positions
    _layouts_hf      transformers 5: ViT, DeiT, DINOv2, I-JEPA, ViTMAE; SigLIP and CLIP
    _layouts_hf4     transformers 4 (ViT, BEiT), and VideoMAE and Data2Vec in 5
    _layouts_placed  transformers with positions in the attention: BEiT (of 5), DINOv3, V-JEPA 2
    _layouts_windows transformers with attention in windows: Swin, Donut
"""

from __future__ import annotations

from maefast.integrations._layouts_eva import Eva, RelPos
from maefast.integrations._layouts_hf import HuggingFace5, Siglip
from maefast.integrations._layouts_hf4 import Beit4, HuggingFace4
from maefast.integrations._layouts_placed import Beit, Dinov3, VJepa2
from maefast.integrations._layouts_timm import Timm
from maefast.integrations._layouts_windows import Swin, Swin4

# The first that fits.
LAYOUTS = (Eva, RelPos, Timm, Beit, Dinov3, VJepa2, Siglip, Swin, HuggingFace5, Beit4, Swin4, HuggingFace4)

__all__ = [
    "LAYOUTS",
    "Beit",
    "Beit4",
    "Dinov3",
    "Eva",
    "HuggingFace4",
    "HuggingFace5",
    "RelPos",
    "Siglip",
    "Swin",
    "Swin4",
    "Timm",
    "VJepa2",
]
