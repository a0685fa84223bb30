"""What `accelerate` did to a model: a list of notes, readable as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# Names under which FSDP1, torch.compile and checkpointing hold the module they wrap; state dicts leave them out too.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Note:
    """One finding about one part of the model.

    Attributes:
        path: name of the module ("" is the model). method: which of its methods, or "".
        replaced: whether maefast serves it now. text: by what, or why not.
    """

    path: str
    method: str
    replaced: bool
    text: str


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

    def add(self, path: str, method: str, replaced: bool, text: str) -> None:
        note = Note(path, method, replaced, text)
        if note not in self.notes:
            self.notes.append(note)

    def __str__(self) -> str:
        what = f" ({', '.join(self.families)})" if self.families else ""
        lines = [f"maefast.accelerate: {self.model}{what}"]
        for title, notes in (("replaced", self.replaced), ("not replaced", self.kept)):
            if notes:
                lines.append(f"  {title}")
                lines += _table(notes)
        if not self.replaced:
            lines.append("  nothing is replaced; the model runs as it was")
        return "\n".join([*lines, *(f"  {text}" for text in self.checks)])


def _table(notes: Iterable[Note]) -> list[str]:
    """Lines "where  what"; modules that differ in their number only share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        path = [part for part in note.path.split(".") if part not in WRAPPERS]
        where = ".".join(part for part in (*path, note.method) if part) or "the model"
        groups.setdefault((re.sub(r"\.\d+", ".*", where), note.text), []).append(where)
    rows = [(_span(key, names), text) for (key, text), names in groups.items()]
    width = max(len(where) for where, _ in rows)
    return [f"    {where:<{width}}  {text}" for where, text in rows]


def _span(pattern: str, names: list[str]) -> str:
    """ "blocks.0-11" for blocks.0 to blocks.11; the pattern where the numbers have gaps."""
    if len(names) == 1:
        return names[0]
    numbers = [[int(n) for n in re.findall(r"\.(\d+)", name)] for name in names]
    if len(numbers[0]) == 1:
        run = sorted(n for (n,) in numbers)
        if run == list(range(run[0], run[-1] + 1)):
            return pattern.replace("*", f"{run[0]}-{run[-1]}")
    return f"{pattern} ({len(names)})"
