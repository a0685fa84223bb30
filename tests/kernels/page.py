"""docs/kernels.md: its tables, from variants as they were compiled, and whether it shows what these show.

A section is compared with the page only where the page names the same compilers: others give other numbers.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernels.narrow import CAUSES
from tests.kernels.resources import wide_share
from tests.kernels.variants import TARGETS, Variant

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
HEADS = ["kernel", "", "warps", "registers", "spills, B", "shared, KiB", "occupancy, %", "held by"]
HEADS += ["loads, %", "stores, %", "variant"]
UNKNOWN = "not looked at: mend it, or say in tests/kernels/narrow.py why it cannot be"
SHOWN = 60  # lines of a difference


class Section(NamedTuple):
    """name: of its markers. compilers: with their versions, None without any. variants: [] where none could be had."""

    name: str
    compilers: str | None
    variants: list[Variant]

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- begin {self.name}: written by make kernels -->", f"<!-- end {self.name} -->"


class One(NamedTuple):
    """A launch on all targets."""

    variants: tuple[Variant, ...]

    def each(self, value: Callable[[Variant], Any]) -> str:
        """ "40" where all targets agree, else "40 / 38 / 40"."""
        texts = [str(value(v)) for v in self.variants]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    def rank(self) -> tuple:
        """The worst first: the lowest occupancy, then the most registers."""
        least = min(v.occupancy.share for v in self.variants)
        return least, -max(v.found.registers for v in self.variants), self.variants[0].case

    def share(self, what: str) -> float | None:
        """The least of its targets, of "loads" or "stores"."""
        found = [wide_share(getattr(v.found, what)) for v in self.variants]
        return min((share for share in found if share is not None), default=None)

    def least(self) -> float:
        """Of both."""
        return min((share for what in ("loads", "stores") if (share := self.share(what)) is not None), default=1.0)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def kib(size: int) -> str:
    return f"{size / 1024:.1f}".removesuffix(".0")


def families(variants: Iterable[Variant]) -> dict[str, dict[str, list[One]]]:
    """{family: {kernel: its launches, the worst first}}, by name."""
    launches = defaultdict(list)
    for v in variants:
        launches[v.family, v.kernel, v.launch].append(v)
    found: dict[str, dict[str, list[One]]] = defaultdict(lambda: defaultdict(list))
    for (family, kernel, _), same in sorted(launches.items()):
        found[family][kernel].append(One(tuple(sorted(same, key=lambda v: TARGETS.index(v.target)))))
    for kernels in found.values():
        for ones in kernels.values():
            ones.sort(key=One.rank)
    return found


def table(heads: list[str], rows: list[list[str]], words: Iterable[int]) -> str:
    """`words`: the columns that are no figures."""
    rule = ["---" if column in words else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows)) + "\n"


def row(kernel: str, which: str, one: One) -> list[str]:
    return [
        kernel,
        which,
        one.each(lambda v: v.warps),
        one.each(lambda v: v.found.registers),
        one.each(lambda v: v.found.spilled),
        one.each(lambda v: kib(v.shared)),
        one.each(lambda v: percent(v.occupancy.share)),
        one.each(lambda v: " and ".join(v.occupancy.held) or "-"),
        one.each(lambda v: percent(wide_share(v.found.loads))),
        one.each(lambda v: percent(wide_share(v.found.stores))),
        one.variants[0].case,
    ]


def render(section: Section) -> str:
    """What stands between the markers of a section."""
    found = families(section.variants)
    parts = [first_line(section), ""]
    for family, kernels in found.items():
        rows = []
        for kernel, ones in kernels.items():
            name = f"`{kernel}`"
            if len(ones) == 1:
                rows.append(row(name, "only", ones[0]))
                continue
            rows.append(row(name, f"worst of {len(ones)}", ones[0]))
            rows.append(row("", "typical", ones[len(ones) // 2]))
        parts += [f"### {family}", "", table(HEADS, rows, (0, 1, 7, 10))]
    if more := narrow({kernel: ones for kernels in found.values() for kernel, ones in kernels.items()}):
        parts.append(more)
    return "\n".join(parts)


def narrow(kernels: dict[str, list[One]]) -> str:
    """The kernels of which some variant moves less than half of what it loads, or stores, by wide accesses."""
    rows = []
    for kernel, ones in sorted(kernels.items()):
        shares = {what: [one.share(what) for one in ones] for what in ("loads", "stores")}
        low = {what: sum(share is not None and share < 0.5 for share in found) for what, found in shares.items()}
        if not any(low.values()):
            continue
        v = min(ones, key=lambda one: (one.least(), one.rank())).variants[-1]
        counts = [f"{low[what]} of {len(ones)}" for what in shares]
        moved = "; ".join(f"{what} {widths(getattr(v.found, what))}" for what in shares)
        rows.append([f"`{kernel}`", *counts, moved, v.case, CAUSES.get(kernel, UNKNOWN)])
    if not rows:
        return ""
    heads = ["kernel", "loads", "stores", "the narrowest, sm_100", "variant", "why"]
    return "\n".join(["### Narrow accesses", "", table(heads, rows, (0, 3, 4, 5))])


def widths(found: dict[int, int]) -> str:
    return ", ".join(f"{count} x {width} B" for width, count in found.items()) or "none"


def first_line(section: Section) -> str:
    kinds = len({(v.family, v.kernel) for v in section.variants})
    return f"{kinds} kernels, {len(section.variants)} compilations by {section.compilers}."


def update(
    sections: list[Section], page: Path = PAGE, write: bool = True, adopt: bool = False
) -> tuple[bool, list[str]]:
    """(whether the page shows what was compiled, what to say of it). write: put right what it shows wrongly.
    adopt: of other compilers than those that the page names, too. Raises ValueError for a page without markers."""
    text = old = page.read_text()
    notes = []
    for section in sections:
        begin, end = section.markers
        head, found, rest = text.partition(begin)
        body, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page} lacks the lines {begin!r} and {end!r}")
        if section.compilers is None or {v.target for v in section.variants} != set(TARGETS):
            notes.append(f"{page.name}: nothing here compiles its section {section.name!r}; its rows are kept")
        elif f" compilations by {section.compilers}.\n" not in body and not adopt:
            what = f"{page.name}: section {section.name!r} names other compilers"
            notes.append(f"{what} than {section.compilers}: not compared")
        else:
            text = f"{head}{begin}\n\n{render(section)}\n{end}{tail}"
    if text == old:
        return True, notes
    lines = old.splitlines(), text.splitlines()
    changes = list(difflib.unified_diff(*lines, page.name, "compiled", n=0, lineterm=""))
    notes += changes[:SHOWN] + ([f"... {len(changes) - SHOWN} more lines"] if len(changes) > SHOWN else [])
    if write:
        page.write_text(text)
    done = "it has been written anew, commit it" if write else "run make kernels"
    return False, [*notes, f"{page.name} did not show what the kernels take: {done}"]
