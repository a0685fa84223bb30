"""A run whose second process dies once, for torchrun to start all of them again: python -m torch.distributed.run
--max-restarts 1 ... -m tests.train.elastic CONFIG STEP."""

from __future__ import annotations

import os
import signal
import sys

from maefast.train import PretrainConfig, pretrain
from maefast.train.config import load_config
from maefast.train.loop import Run


def main() -> None:
    path, step = sys.argv[1], int(sys.argv[2])
    original = Run._step

    def die_once(self):
        original(self)
        if self.done == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    Run._step = die_once
    pretrain(PretrainConfig(**load_config(path)))


if __name__ == "__main__":
    main()
