"""Results to tables and charts, so that no figure is typed by hand: `maefast bench report`.

    maefast bench report [--results FOLDER] [--page FILE] [--charts FOLDER] [--check]

In a checkout, bench/results becomes the tables of docs/results.md, with charts in docs/images/bench, and of README.md;
results whose code has changed since (`maefast.bench.freshness`) go to docs/results-earlier.md. For another folder of
results, or anywhere else, a page report.md with its charts is written into that folder, and shows all of them.

--check says whether the pages are what was written from these results, and warns where the code has changed since.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maefast.bench import freshness, menu, overview, results, sections
from maefast.bench.environment import CHECKOUT, slug

BEGIN, END = "<!-- begin: written by maefast bench report -->", "<!-- end -->"
LISTED = "<!-- of earlier code:"  # a list, from which --check knows which page a result stands on
PAGE, EARLIER, README = Path("docs/results.md"), Path("docs/results-earlier.md"), Path("README.md")
CHARTS = Path("docs/images/bench")
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


def render(
    docs: list[dict], charts: dict[str, list[tuple[str, str]]] | None = None, missing: tuple[str, ...] = ("cpu", "cuda")
) -> str:
    """The generated part of a page: a chapter for each device, GPUs last. charts: device -> (title, path). missing: say
    of these kinds of device that they are not measured yet, where they are not."""
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
        if kind in missing and kind not in {found for found, _ in order}:
            parts.append(f"## {name}\n\n{name} figures are not measured yet.\n")
    return "\n".join(parts)


def pages(now: list[dict], earlier: list[dict], charts: dict[str, list[tuple[str, str]]]) -> dict[Path, str]:
    """The generated part of each page of the checkout."""
    assert CHECKOUT is not None
    kinds = {kind: [doc for doc in earlier if doc["environment"]["kind"] == kind] for kind in ("cpu", "cuda")}
    shown = render(now, charts, tuple(kind for kind, docs in kinds.items() if not docs))
    devices = sorted({doc["environment"]["device"] for doc in earlier})
    if devices:
        shown = f"Measured with [earlier code]({EARLIER.name}): {'; '.join(devices)}.\n\n{shown}"
    listed = "".join(f"{file}: {' '.join(names)}\n" for file, names in _targets(earlier).items())
    old = f"{LISTED}\n{listed}-->\n\n" + (render(earlier, missing=()) if earlier else "Nothing.\n")
    return {
        CHECKOUT / PAGE: shown,
        CHECKOUT / EARLIER: old,
        CHECKOUT / README: overview.tables(now, earlier, EARLIER.as_posix()),
    }


def _targets(docs: list[dict]) -> dict[str, list[str]]:
    """file -> what its records depend on."""
    return {doc["file"]: sorted({freshness.target(doc["kind"], record) for record in doc["records"]}) for doc in docs}


def as_written(docs: list[dict]) -> tuple[list[dict], list[dict]]:
    """(results shown as of now, those shown as of earlier code), as the pages that are there say."""
    assert CHECKOUT is not None
    path = CHECKOUT / EARLIER
    _, _, listed = (path.read_text() if path.is_file() else "").partition(f"{LISTED}\n")
    lines = (line.partition(": ") for line in listed.partition("-->")[0].splitlines())
    old = {(file, name) for file, _, names in lines for name in names.split()}
    return freshness.part(docs, lambda doc, record: (doc["file"], freshness.target(doc["kind"], record)) not in old)


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
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=results.RESULTS if CHECKOUT else menu.DEFAULT)
    parser.add_argument("--page", type=Path, help="one page of all results, instead of those of the checkout")
    parser.add_argument("--charts", type=Path)
    args = parser.parse_args(argv)
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
    ours = CHECKOUT is not None and args.results.resolve() == results.RESULTS and args.page is None
    written = _checkout(args, docs) if ours else _page(args, docs)
    fresh = {page: write(page, text, args.check) for page, text in written.items()}
    for page, same in fresh.items():
        if args.check and not same:
            print(f"{page} does not show {args.results}: run maefast bench report", file=sys.stderr)
        else:
            print(f"{page}: " + ("up to date" if same else "written"))
    return 1 if args.check and not all(fresh.values()) else 0


def _page(args: argparse.Namespace, docs: list[dict]) -> dict[Path, str]:
    """One page that shows everything, with its charts."""
    page, folder = args.page or args.results / "report.md", args.charts or args.results / "charts"
    if not page.exists() and not args.check:
        page.write_text(f"# Measured speed\n\n{BEGIN}\n{END}\n")
    return {page: render(docs, (drawn if args.check else draw)(docs, folder, page))}


def _checkout(args: argparse.Namespace, docs: list[dict]) -> dict[Path, str]:
    """The pages of the checkout. A check takes from them which results are of earlier code, so that it holds of a clone
    without history, and a commit to a kernel leaves it green; it says what would move."""
    assert CHECKOUT is not None
    folder, page = args.charts or CHECKOUT / CHARTS, CHECKOUT / PAGE
    if args.check:
        shown, earlier = as_written(docs)
        for file, names in _targets(freshness.split(shown)[1]).items():
            why = "code has changed since, or git does not know its commit"
            print(f"warning: {PAGE} shows {file}, but {why}: {', '.join(names)}", file=sys.stderr)
        return pages(shown, earlier, drawn(shown, folder, page))
    now, earlier = freshness.split(docs)
    charts = draw(now, folder, page)
    kept = {(page.parent / path).resolve() for found in charts.values() for _, path in found}
    for path in folder.glob("*/*.png"):
        if path.resolve() not in kept:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    return pages(now, earlier, charts)


if __name__ == "__main__":
    sys.exit(main())
