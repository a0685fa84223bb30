"""What `accelerate` would do to somebody's own model, here: the command `maefast accelerate-check`.

factories  MODULE:NAME to a model or a batch
inputs     what the model is given: named shapes, a batch, or a guess
parity     whether the model computes the same before and after
speed      how long a step takes before and after, and how much memory
found      what came out: a table, JSON, an exit status
run        all of it, in order
"""

from .found import Check
from .parity import Difference
from .run import accelerate_check
from .speed import Speed

__all__ = ["Check", "Difference", "Speed", "accelerate_check"]
