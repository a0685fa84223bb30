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
    """Run `maefast pretrain` from Python; see `maefast.train.loop.pretrain`.

    Args:
        config: a `PretrainConfig`. kwargs: `create_model`, for a model or recipe of your own.

    Returns:
        A `maefast.train.loop.Result`. Raises TrainError, saying what to do.
    """
    from .loop import pretrain as run

    return run(config, **kwargs)
