"""What moved between two runs, beyond the noise: `maefast bench compare A B`.

    maefast bench compare BEFORE AFTER [--least 0.05] [--alpha 0.05] [--all]

BEFORE and AFTER are result files, or folders of them. A case is what both measured: the same op, shape, dtype, pass and
variant, or the same model, batch, dtype and peer. What is compared is the time of ours over that of the eager peer in
the same round of the same run, because a machine that is faster today is so for both; where a case has no such peer,
the times themselves (then both runs must be of one device). The rounds of the two runs are compared by the test of Mann
and Whitney (1947), and of the cases that are told to have moved a share of at most `alpha` did not (Benjamini and
Hochberg, 1995). A case must also have moved by more than `least`: two processes with the same code differ by some per
cent in where their memory lies, which no number of rounds averages out.

Exit status: 0 nothing became slower, 1 something did, 2 the two cannot be compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maefast.bench import results

Case = tuple
SECONDS = ("median_s", "step_s", "best_s")


@dataclass(frozen=True)
class Moved:
    """One case. change: the median after over that before, less one. p: after correction, None where there were too few
    rounds to test (fewer than 4 on a side)."""

    case: Case
    change: float
    p: float | None
    relative: bool
    verdict: str  # "slower", "faster", "same" or "untested"


def compare(before: list[dict], after: list[dict], least: float = 0.05, alpha: float = 0.05) -> list[Moved]:
    """All cases that both sides measured, the slowest first.

    Raises:
        ValueError: they have no case in common, or nothing but times of two devices.
    """
    old, new = dict(cases(before)), dict(cases(after))
    shared = [case for case in old if case in new]
    if not shared:
        raise ValueError("the two have no case in common")
    devices = {doc["environment"]["device"] for doc in (*before, *after)}
    rows = []
    for case in shared:
        a, b = old[case], new[case]
        relative = a.relative and b.relative
        if not relative and len(devices) > 1:
            continue
        first, second = (a.relative, b.relative) if relative else (a.seconds, b.seconds)
        change = statistics.median(second) / statistics.median(first) - 1
        enough = min(len(first), len(second)) >= 4
        rows.append((case, change, _p(first, second) if enough else None, bool(relative)))
    if not rows:
        raise ValueError(f"only times without a peer in common, of different devices: {', '.join(sorted(devices))}")
    tested = [p for _, _, p, _ in rows if p is not None]
    corrected = iter(_corrected(tested) if tested else [])
    found = []
    for case, change, p, relative in rows:
        p = None if p is None else next(corrected)
        far = abs(change) > least
        verdict = "untested" if p is None and far else "same"
        if p is not None and far and p < alpha:
            verdict = "slower" if change > 0 else "faster"
        found.append(Moved(case, change, p, relative, verdict))
    return sorted(found, key=lambda row: -row.change)


@dataclass(frozen=True)
class Rounds:
    """Of one case: seconds of each round, and the same over those of the eager peer in that round, if it has one."""

    seconds: list[float]
    relative: list[float]


def cases(docs: list[dict]) -> Iterator[tuple[Case, Rounds]]:
    """Of ours alone, and of those that a user gets: not of the peers."""
    for doc in docs:
        groups: dict[Case, dict[str, dict]] = {}
        for record in doc["records"]:
            if "error" not in record:
                groups.setdefault(_what(record), {})[_who(record)] = record
        for what, group in groups.items():
            peer = next((group[name] for name in ("eager", "plain", "as_is") if name in group), None)
            for who, record in group.items():
                if who.startswith(("maefast", "accelerated")):
                    yield (doc["kind"], *what, who), _rounds(record, peer)
        if doc["kind"] == "recipes":
            for record in doc["records"]:
                if samples := record.get("samples_s"):
                    pairs = zip(samples["maefast"], samples["plain"])
                    case = ("recipes", record["recipe"], record["size"], record["batch"], record["dtype"], "maefast")
                    yield case, Rounds(samples["maefast"], [ours / plain for ours, plain in pairs])


def _what(record: dict) -> Case:
    shape = record.get("shape", {})
    names = ("op", "family", "preset", "dtype", "direction", "batch", "visible", "side", "width", "tokens", "depth")
    return (*(str(record[name]) for name in names if name in record), shape.get("name", ""), shape.get("batch", ""))


def _who(record: dict) -> str:
    return record.get("variant") or record.get("peer") or ""


def _rounds(record: dict, peer: dict | None) -> Rounds:
    seconds = record.get("samples_s") or [record[name] for name in SECONDS if name in record][:1]
    others = peer.get("samples_s") if peer else None
    paired = others and record.get("samples_s") and len(others) == len(seconds)
    return Rounds(seconds, [ours / theirs for ours, theirs in zip(seconds, others)] if paired else [])


def _p(first: list[float], second: list[float]) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(first, second, alternative="two-sided").pvalue)


def _corrected(values: list[float]) -> list[float]:
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(values)]


def load(path: Path) -> list[dict]:
    if path.is_dir():
        return results.read_all(path)
    return [results.read(path)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "maefast bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.05, help="smallest change of a median that counts")
    parser.add_argument("--alpha", type=float, default=0.05, help="share of false ones among the cases that moved")
    parser.add_argument("--all", action="store_true", help="show what stayed the same, too")
    args = parser.parse_args(argv)
    try:
        rows = compare(load(args.before), load(args.after), args.least, args.alpha)
    except (OSError, ValueError) as error:
        print(f"maefast bench compare: {error}", file=sys.stderr)
        return 2
    show(rows, args.all)
    return 1 if any(row.verdict == "slower" for row in rows) else 0


def show(rows: list[Moved], everything: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", "change", "p", "of", "case", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        if everything or row.verdict != "same":
            what = "time over the peer's" if row.relative else "time"
            p = "-" if row.p is None else f"{row.p:.1e}"
            table.add_row(row.verdict, f"{row.change:+.1%}", p, what, " ".join(str(part) for part in row.case if part))
    console = Console(width=None if Console().is_terminal else 160)
    if table.row_count:
        console.print(table)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("slower", "faster", "untested")}
    counts["same"] = len(rows) - sum(counts.values())
    console.print(
        f"{len(rows)} cases: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()), highlight=False
    )


if __name__ == "__main__":
    sys.exit(main())
