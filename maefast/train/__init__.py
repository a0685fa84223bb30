"""The training layer behind `maefast pretrain | reconstruct | export`. Needs `pip install "maefast[train]"`."""

from maefast.errors import BadImage, CheckpointError, ConfigError, NonFiniteLoss, TrainError

from .config import PretrainConfig

__all__ = [
    "BadImage",
    "CheckpointError",
    "ConfigError",
    "NonFiniteLoss",
    "PretrainConfig",
    "TrainError",
    "pretrain",
]


def pretrain(config: PretrainConfig, **kwargs):
    """Run `maefast pretrain` from Python; see `maefast.train.loop.pretrain`."""
    from .loop import pretrain as run

    return run(config, **kwargs)
