"""Results to tables and charts, so that no figure is typed by hand: `maefast bench report`.

    maefast bench report [--results FOLDER] [--page FILE] [--charts FOLDER] [--check]

In a checkout, bench/results becomes the tables of docs/results.md, with charts in docs/images/bench. Anywhere else, or
for another folder of results, a page report.md with its charts is written into that folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maefast.bench import menu, results, sections
from maefast.bench.environment import CHECKOUT, slug

BEGIN, END = "<!-- begin: written by maefast bench report -->", "<!-- end -->"
SECTIONS = {
    "step": ("One training step", sections.step),
    "dropin": ("Drop-in: one training step of other people's models", sections.dropin),
    "recipes": ("Recipes: forward and backward beside plain PyTorch", sections.recipes),
    "scaling": ("Time against visible tokens and batch", sections.scaling),
    "micro": ("Ops", sections.micro),
    "block": ("A transformer block", sections.block),
    "volumes": ("Volumes", sections.volumes),
    "toys": ("Models too small for kernels", sections.toys),
    "data": ("Loading photographs", sections.data),
}


def load(folder: Path) -> list[dict]:
    """All results, less the cases that the same machine has measured anew in a later file."""
    docs = results.read_all(folder)
    seen: dict[tuple, set] = {}
    for doc in sorted(docs, key=lambda doc: (doc["environment"]["date"], doc["file"]), reverse=True):
        env = doc["environment"]
        where = doc["kind"], env["kind"], env["device"], env["cpu_threads"] if env["kind"] == "cpu" else None
        old = seen.setdefault(where, set())
        doc["records"] = [record for record in doc["records"] if sections.case(doc["kind"], record) not in old]
        old |= {sections.case(doc["kind"], record) for record in doc["records"]}
    return [doc for doc in docs if doc["records"]]


def render(docs: list[dict], charts: dict[str, list[tuple[str, str]]] | None = None) -> str:
    """The generated part of the page: a chapter for each device, GPUs last. charts: device -> (title, path)."""
    parts = []
    order = sorted({(doc["environment"]["kind"], doc["environment"]["device"]) for doc in docs})
    for kind, device in order:
        found = [d for d in docs if (d["environment"]["kind"], d["environment"]["device"]) == (kind, device)]
        parts.append(f"## {device}\n")
        parts += [f"![{title}]({path})\n" for title, path in (charts or {}).get(device, [])]
        for what, (title, section) in SECTIONS.items():
            if mine := [doc for doc in found if doc["kind"] == what]:
                parts.append(f"### {title}\n\n{section(mine)}")
    for kind, name in (("cpu", "CPU"), ("cuda", "GPU")):
        if kind not in {found for found, _ in order}:
            parts.append(f"## {name}\n\n{name} figures are not measured yet.\n")
    return "\n".join(parts)


def write(page: Path, text: str, check: bool = False) -> bool:
    """Replace what stands between the markers; returns whether the page was up to date already.

    Raises:
        ValueError: the page has no markers.
    """
    old = page.read_text()
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}")
    new = f"{head}{BEGIN}\n\n{text}\n{END}{tail}"
    if new != old and not check:
        page.write_text(new)
    return new == old


def draw(docs: list[dict], folder: Path, page: Path) -> dict[str, list[tuple[str, str]]]:
    """Charts of each device in a folder of its own below `folder`; their paths as `page` names them."""
    from maefast.bench import charts

    found: dict[str, list[tuple[str, str]]] = {}
    for device in sorted({doc["environment"]["device"] for doc in docs}):
        mine = [doc for doc in docs if doc["environment"]["device"] == device]
        for title, path in charts.draw(device, mine, folder / slug(device)):
            found.setdefault(device, []).append((title, _relative(path, page.parent)))
    return found


def drawn(docs: list[dict], folder: Path, page: Path) -> dict[str, list[tuple[str, str]]]:
    """The charts that are there already, for a page that is only checked."""
    from maefast.bench.charts import CHARTS

    found: dict[str, list[tuple[str, str]]] = {}
    for device in sorted({doc["environment"]["device"] for doc in docs}):
        for name, (title, _) in CHARTS.items():
            path = folder / slug(device) / f"{name}.png"
            if path.is_file():
                found.setdefault(device, []).append((f"{title}, {device}", _relative(path, page.parent)))
    return found


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "maefast bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say (by exit status 1) if the page is out of date")
    parser.add_argument("--results", type=Path, default=results.RESULTS if CHECKOUT else menu.DEFAULT)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--charts", type=Path)
    args = parser.parse_args(argv)
    ours = CHECKOUT is not None and args.results.resolve() == results.RESULTS
    page = args.page or (CHECKOUT / "docs" / "results.md" if ours else args.results / "report.md")
    folder = args.charts or (CHECKOUT / "docs" / "images" / "bench" if ours else args.results / "charts")
    try:
        docs = load(args.results)
    except (OSError, ValueError) as error:
        print(f"maefast bench report: {error}", file=sys.stderr)
        return 2
    if not docs:
        print(
            f"maefast bench report: no results in {args.results}; maefast bench lists what can be run", file=sys.stderr
        )
        return 2
    if not page.exists() and not args.check:
        page.write_text(f"# Measured speed\n\n{BEGIN}\n{END}\n")
    charts = drawn(docs, folder, page) if args.check else draw(docs, folder, page)
    fresh = write(page, render(docs, charts), args.check)
    if args.check and not fresh:
        print(f"{page} does not show {args.results}: run maefast bench report", file=sys.stderr)
        return 1
    print(f"{page}: " + ("up to date" if fresh else "written"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
