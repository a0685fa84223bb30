"""What a profile says: a table, one sentence, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .advice import Advice

FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Stage:
    """Of one step, on average.

    Attributes:
        name: see docs/profile.md. seconds: forward + backward + python. share: of `Report.seconds`.
        forward, backward: seconds in ops, in the forward and the backward (the backward of a stage is that of the ops
            it called). python: seconds between ops, in Python and autograd.
        calls: how often it began in the forward. bytes: what its forward allocated and the backward still finds.
    """

    name: str
    seconds: float
    share: float
    forward: float
    backward: float
    python: float
    calls: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes. `peak`: the most that a step holds above what was held before it, reached in `stage`. `kept`: of it, what
    the forward leaves for the backward. `weights`, `gradients`, `optimizer`: what lies there between steps."""

    peak: int
    stage: str
    kept: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Report:
    """What `profile` found.

    Attributes:
        machine: in one line. device: "cpu" or "cuda". steps: how many were timed.
        seconds: one step as it runs without a profiler, with waiting for its batch: the sum of the stages.
        spread: least and most seconds of a step.
        stages: in the order of a step; those that took no time are left out.
        python: seconds between ops, in all stages together; on a GPU seconds that it was idle.
        ops: how many a step calls; on a GPU, kernels.
        shares: of `seconds`, which add up to one: "data" (waiting for a batch), "launch" (`python`, and on a CPU ops
            too small to be more than their call), "products" (larger matrix products, convolutions, attention),
            "memory" (all other ops), "elsewhere" (C functions that are no ops).
        waits: how often the host waited for the device, by the line that made it; None: on a CPU there is nothing to
            wait for.
        load: of the machine, processes that wanted to run in the last minute (this one too); None: it does not tell.
        cpus: how many there are to use.
        slowdown: how many times as long a step took under the profiler. scale: what its times were multiplied by to add
            up to `seconds`, after what recording takes was taken off; near 1, or the two runs differed.
    """

    machine: str
    device: str
    steps: int
    seconds: float
    spread: tuple[float, float]
    stages: tuple[Stage, ...]
    python: float
    ops: int
    shares: Mapping[str, float]
    memory: Memory
    waits: Mapping[str, int] | None
    load: float | None
    cpus: int
    slowdown: float
    scale: float
    advice: Advice

    def stage(self, name: str) -> Stage:
        """By its name. KeyError: the step has none of it."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage {name!r}; there are: {', '.join(stage.name for stage in self.stages)}")

    def json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    def show(self, console: Any = None, heading: bool = True) -> None:
        """Print it on a `rich.console.Console` (default: standard output); without `heading`, not the machine."""
        from rich.console import Console

        console = console or Console(width=None if sys.stdout.isatty() else 120)

        def say(text: str, **style: Any) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True, **style)

        if heading:
            say(self.machine)
        least, most = (f"{1e3 * seconds:.1f}" for seconds in self.spread)
        say(f"one step: {1e3 * self.seconds:.1f} ms (of {self.steps}: {least} to {most})\n")
        console.print(self._table())
        for line in self._notes():
            say(line)
        say(self.advice.sentence, style="bold")

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        last = "idle" if self.device == "cuda" else "Python"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("stage", "ms", "share", "forward", "backward", last, "calls", "kept MiB"):
            table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
        for stage in self.stages:
            parts = (_ms(part) for part in (stage.forward, stage.backward, stage.python))
            calls = str(stage.calls) if stage.calls else ""
            table.add_row(stage.name, _ms(stage.seconds), f"{stage.share:.1%}", *parts, calls, _mib(stage.bytes))
        table.add_section()
        sums = (sum(getattr(stage, part) for stage in self.stages) for part in ("forward", "backward", "python"))
        total = sum(stage.seconds for stage in self.stages)
        table.add_row("a step", _ms(total), f"{total / self.seconds:.1%}", *map(_ms, sums), "", _mib(self.memory.kept))
        return table

    def _notes(self) -> list[str]:
        memory = self.memory
        held = ", ".join(
            f"{name} {_mib(size) or '0'}"
            for name, size in (
                ("weights", memory.weights), ("gradients", memory.gradients), ("optimizer", memory.optimizer),
            )
        )  # fmt: skip
        lines = [
            f"memory: a step takes {_mib(memory.peak) or '0'} MiB more than lies there between steps, most in "
            f"{memory.stage}; there lie, in MiB: {held}"
        ]
        if self.device == "cuda":
            lines.append(f"the device is idle for {self.python / self.seconds:.0%} of a step of {self.ops} kernels")
            count = sum(self.waits.values())
            where = "".join(f"\n  {times} at {line}" for line, times in self.waits.items())
            lines.append(f"the host waits for the device {count} times in a step{':' * bool(where)}{where}")
        else:
            lines.append(
                f"between its {self.ops} ops, in Python and autograd: {1e3 * self.python:.1f} ms, "
                f"{self.python / self.seconds:.0%}; no device that the host could wait for"
            )
        lines.append(f"a step took {self.slowdown:.2f} times as long under the profiler; its times were scaled by "
                     f"{self.scale:.2f}")  # fmt: skip
        if self.load is not None and self.load > self.cpus + 0.5:
            lines.append(
                f"other programs were running (load {self.load:.1f} on {self.cpus} CPUs): the times are not those of a "
                "quiet machine, least of all those between ops"
            )
        return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size else ""
