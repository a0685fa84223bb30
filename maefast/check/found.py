"""What came out of a check: a table, JSON, an exit status."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from maefast.integrations import Note, Report

from .parity import Difference
from .speed import Speed

FORMAT = 1  # of the JSON
EQUAL, NOTHING, DIFFERS = 0, 1, 4


@dataclass(frozen=True)
class Check:
    """What `accelerate_check` found.

    Attributes:
        machine: in one line. factory: what was named. model: its class. given: what it was given. device: "cpu" or
            "cuda". dtype: "float32", or "bfloat16" for autocast. training: with gradients, or evaluating without.
        report: of `accelerate`, with what ran of it in the calls that were compared.
        parity: how the two differ; empty where nothing is replaced. speed: None where nothing is replaced, or the two
            differ.
    """

    machine: str
    factory: str
    model: str
    given: str
    device: str
    dtype: str
    training: bool
    report: Report
    parity: tuple[Difference, ...]
    speed: Speed | None

    @property
    def equal(self) -> bool:
        """Whether the two differ by no more than rounding explains."""
        return all(difference.equal for difference in self.parity)

    @property
    def status(self) -> int:
        """Of the command: 0 replaced and equal, 1 nothing replaced, 4 replaced and not equal."""
        if not self.report.replaced:
            return NOTHING
        return EQUAL if self.equal else DIFFERS

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.status == NOTHING:
            return "Nothing would be replaced: the model runs as it is."
        if self.status == DIFFERS:
            worst = next(difference for difference in self.parity if not difference.equal)
            return (
                f"Accelerated, the model computes something else: {worst.what} ({worst.where}). No time is given. "
                "maefast.accelerate should have noticed: please report it."
            )
        ran = [note.runs for note in self.report.replaced if note.runs]
        if ran and not any(text.startswith("ran fast") for text in ran):
            return "Replaced, but all of it ran as it was with this input: see the calls above."
        what = "step" if self.training else "forward"
        return f"Replaced, and equal up to rounding: a {what} as it is takes {self.speed.ratio:.2f} times as long."

    def json(self) -> str:
        report = self.report
        found = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("machine", "factory", "model", "given", "device", "dtype")},
            "training": self.training,
            "status": self.status,
            "verdict": self.verdict,
            "families": report.families,
            "replaced": [_note(note) for note in report.replaced],
            "kept": [{**_note(note), "missed": note.gain} for note in report.kept],
            "checks": report.checks,
            "parity": [
                {
                    **asdict(difference),
                    "value": _number(difference.value),
                    "allowed": _number(difference.allowed),
                    "equal": difference.equal,
                }
                for difference in self.parity
            ],
            "speed": None if self.speed is None else asdict(self.speed),
        }
        return json.dumps(found, indent=2, allow_nan=False)

    def show(self, console: Any = None) -> None:
        """Print it on a `rich.console.Console` (default: standard output), without the machine and the input."""
        from rich.console import Console

        console = console or Console(width=None if sys.stdout.isatty() else 120)

        def say(text: str, **style: Any) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True, **style)

        self.report.show(console)
        if self.parity:
            say("")
            console.print(self._table())
        say(self.verdict, style="bold")

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("", "as it is", "accelerated", ""):
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        table.add_column("", overflow="fold")  # names of parameters may be long
        if self.speed is not None:
            speed, spread = self.speed, "{:.2f} to {:.2f}".format(*self.speed.spread)
            what = "forward + backward, ms" if self.training else "forward, ms"
            times = (f"{1e3 * seconds:.2f}" for seconds in speed.seconds)
            table.add_row(what, *times, f"{speed.ratio:.2f}x", f"half of {speed.rounds} rounds: {spread}")
            first, second = speed.memory
            share = f"{second / first:.2f}x" if first else ""
            table.add_row("memory of a step, MiB", f"{first / 2**20:.1f}", f"{second / 2**20:.1f}", share, "")
        for difference in self.parity:
            off = "equal" if difference.value == 0 else f"off by {difference.value:.0e}"
            allowed = f"up to {difference.allowed:.0e} is rounding" if difference.allowed else ""
            details = ", ".join(filter(None, (difference.where, allowed)))
            table.add_row(difference.what, "", "", off if difference.equal else f"{off}: NOT EQUAL", details)
        return table


def _note(note: Note) -> dict[str, str]:
    return {"where": note.where, "what": note.text, "runs": note.runs}


def _number(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
