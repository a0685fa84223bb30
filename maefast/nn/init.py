"""Weight initialisation of MAE (He et al., 2021, appendix A.1)."""

from __future__ import annotations

from torch import Tensor, nn

TOKEN_STD = 0.02


def init_weights_(module: nn.Module) -> None:
    """Linear layers Xavier-uniform with zero bias; LayerNorms one and zero. In place, for all submodules."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def init_tokens_(*tokens: Tensor) -> None:
    """Class, mask and learned position embeddings: normal with standard deviation 0.02."""
    for token in tokens:
        nn.init.normal_(token, std=TOKEN_STD)
