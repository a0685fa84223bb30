"""What `accelerate` did to a model, and what has run since: a list of notes, readable as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from maefast.integrations import _swap

# Names under which FSDP1, torch.compile and checkpointing hold the module they wrap; state dicts leave them out too.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted name


@dataclass(frozen=True)
class Note:
    """One finding about one part of the model.

    Attributes:
        path: name of the module ("" is the model). method: which of its methods, or "". replaced: whether maefast
            serves it now. text: by what, or why not. swapped: whether this is about a replaced method ("" for forward).
        gain: what serving a part that is not replaced would bring. detail: the traceback of an error, for
            `Report.verbose`. runs: what has run since, see `report`.
    """

    path: str
    method: str
    replaced: bool
    text: str
    swapped: bool = False
    gain: str = ""
    detail: str = field(default="", compare=False)
    runs: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        path = [part for part in self.path.split(".") if part not in WRAPPERS]
        return ".".join(part for part in (*path, self.method) if part) or "the model"

    @property
    def what(self) -> str:
        """The text, and what is missed."""
        return f"{self.text}; missed: {self.gain}" if self.gain and not self.replaced else self.text


@dataclass
class Report:
    """What was replaced in a model, what was not, and why.

    Attributes:
        model: name of its class. families: systems that were recognised. notes: see `Note`. checks: what was compared.
    """

    model: str
    families: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[Note]:
        return [note for note in self.notes if note.replaced]

    @property
    def kept(self) -> list[Note]:
        return [note for note in self.notes if not note.replaced]

    def add(self, path: str, method: str, replaced: bool, text: str, **more: Any) -> None:
        """`more`: further attributes of the note."""
        note = Note(path, method, replaced, text, **more)
        if note not in self.notes:
            self.notes.append(note)

    def now(self, model: nn.Module) -> Report:
        """The report of `model` as it is now: what has been restored since, and what ran how often."""
        return replace(self, notes=[_now(note, model) for note in self.notes])

    def why(self) -> str:
        """Why everything stays, in one line: the first reason, and how many more there are. "" where there is none."""
        rows = [f"{where}: {text}" for where, text in _rows((n.where, n.text) for n in self.kept)]
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        return f"{rows[0]}{more}" if rows else ""

    def show(self, console: Any = None) -> None:
        """Print it on a `rich.console.Console` (default: standard output)."""
        from rich.console import Console

        (console or Console()).print(str(self), highlight=False, markup=False, soft_wrap=True)

    def verbose(self) -> str:
        """The report with the traceback of every error that kept a part as it was."""
        found = dict.fromkeys(note.detail for note in self.notes if note.detail)
        return "\n\n".join([str(self), *found])

    def __str__(self) -> str:
        what = f" ({', '.join(self.families)})" if self.families else ""
        lines = [f"maefast.accelerate: {self.model}{what}"]
        runs = [(note.where, note.runs) for note in self.notes if note.runs]
        for title, rows in (
            ("replaced", [(note.where, note.text) for note in self.replaced]),
            ("not replaced", [(note.where, note.what) for note in self.kept]),
            ("calls since then", runs),
        ):
            if rows:
                lines.append(f"  {title}")
                lines += _table(rows)
        if not self.replaced:
            lines.append("  nothing is replaced; the model runs as it was")
        return "\n".join([*lines, *(f"  {text}" for text in self.checks)])


def _now(note: Note, model: nn.Module) -> Note:
    if not note.swapped:
        return note
    path, _, method = f"{note.path}.{note.method or 'forward'}".rpartition(".")
    try:
        module = model.get_submodule(path.strip("."))
    except AttributeError:  # wrapped, or exchanged, since
        return note
    if method not in _swap.methods(module):
        return replace(note, replaced=False, text="restored, or exchanged for another module", swapped=False)
    runs = _swap.setting(module, _swap.RUNS, {}).get(method)
    return replace(note, runs="" if runs is None else runs.text())


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines "where  what"."""
    rows = _rows(rows)
    width = max(len(where) for where, _ in rows)
    return [f"    {where:<{width}}  {text}" for where, text in rows]


def _rows(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(where, what); modules that differ in their number only share one row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for where, text in rows:
        groups.setdefault((NUMBER.sub("*", where), text), []).append(where)
    return [(_span(key, names), text) for (key, text), names in groups.items()]


def _span(pattern: str, names: list[str]) -> str:
    """ "blocks.0-11" for blocks.0 to blocks.11; the pattern where the numbers have gaps."""
    if len(names) == 1:
        return names[0]
    numbers = [[int(n) for n in NUMBER.findall(name)] for name in names]
    if len(numbers[0]) == 1:
        run = sorted(n for (n,) in numbers)
        if run == list(range(run[0], run[-1] + 1)):
            return pattern.replace("*", f"{run[0]}-{run[-1]}")
    return f"{pattern} ({len(names)})"
