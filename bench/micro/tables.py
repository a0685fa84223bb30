"""Results as tables, ratios first."""

from __future__ import annotations

from collections.abc import Iterable

HEADINGS = {
    "eager": "vs eager",
    "tuned": "vs tuned eager",
    "compile": "vs compiled eager",
    "compile_tuned": "vs compiled tuned",
}


def rows(doc: dict, only_default: bool = False) -> Iterable[dict]:
    """One row for each maefast variant that was timed, with the times of its peers beside it."""
    times: dict[tuple, dict[str, float]] = {}
    for record in doc["records"]:
        times.setdefault(key(record), {})[record["variant"]] = record.get("median_s")
    for record in doc["records"]:
        if "error" in record or not record["variant"].startswith("maefast"):
            continue
        if only_default and not record["default"]:
            continue
        yield {**record, "times": times[key(record)]}


def further(doc: dict) -> tuple[list[str], list[dict]]:
    """(names of the timed peers that have no column in the main table, the default variant's rows that have some)."""
    found = [row for row in rows(doc, only_default=True) if row["ratios"].keys() - HEADINGS.keys()]
    return list(dict.fromkeys(name for row in found for name in row["ratios"] if name not in HEADINGS)), found


def best(row: dict) -> str:
    """The fastest of all peers that computed the case, and how many times longer it takes."""
    if not row["ratios"]:
        return "-"
    name = min(row["ratios"], key=row["ratios"].get)
    return f"{times(row['ratios'][name])} {name}"


def key(record: dict) -> tuple:
    shape = record["shape"]
    return record["op"], shape["name"], shape["batch"], record["dtype"], record["direction"]


def failures(doc: dict) -> list[str]:
    """What gave no time, once for each variant and reason, wrong results first."""
    found: dict[str, list[str]] = {}
    for record in doc["records"]:
        if "error" in record:
            name = f"{record['op']} {record['dtype']} {record['direction']}"
            found.setdefault(f"{record['variant']}: {record['error']}", []).append(name)
    lines = []
    for reason, cases in sorted(found.items(), key=lambda item: "WRONG" not in item[0]):
        where = ", ".join(dict.fromkeys(cases)) if "WRONG" in reason else f"{len(cases)} cases"
        lines.append(f"{reason} ({where})")
    return lines


def what(row: dict) -> tuple[str, str, str, str]:
    """Op, pass, dtype and shape, in few letters."""
    way = "fwd" if row["direction"] == "forward" else "fwd+bwd"
    return row["op"], way, row["dtype"], f"{row['shape']['name']} b{row['shape']['batch']}"


def backend(row: dict) -> str:
    """Which of ours; "automatic" is a call without a backend."""
    return row["variant"].removeprefix("maefast").removeprefix("-") or "automatic"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def spread(record: dict) -> str:
    """Half of the distance between the quartiles, as a share of the median."""
    median = record["step_s"] if "step_s" in record else record["median_s"]
    return f"{(record['high_s'] - record['low_s']) / 2 / median:.0%}"


def of_limit(record: dict) -> str:
    """The share of the machine's limit that was reached, and which limit; in a record of both sides, by ours."""
    share = record.get("limit_share")
    share = share[-1] if isinstance(share, list) else share
    return "-" if share is None else f"{share:.0%} {record['limit']}"


def megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    value = count / 2**20
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def gigaflops(record: dict) -> str:
    """A second."""
    return f"{record['flops'] / record['median_s'] / 1e9:.0f}" if record.get("flops") else "-"


def line(case, records: list[dict]) -> str:
    """Progress of one case."""
    parts = []
    for record in records:
        if "error" in record:
            continue
        ratio = record.get("ratios", {}).get("eager")
        parts.append(
            f"{record['variant']} {milliseconds(record['median_s'])} ms" + (f" ({ratio:.2f}x)" if ratio else "")
        )
    return f"{case}: " + ", ".join(parts)


def rounds(settings: dict) -> str:
    """How many a case had."""
    seconds = settings.get("seconds_a_case")
    fewer = f" (fewer, at least {settings['least_rounds']}, where they took over {seconds:g} s)" if seconds else ""
    return f"Medians of {settings['rounds']} rounds{fewer}."


def left_out(doc: dict) -> str:
    """How many cases a run that was stopped, or whose time was spent, did not come to; or nothing."""
    count = doc["settings"].get("cases_left_out")
    return f"{count} cases were left out: the run was stopped, or its time was spent." if count else ""


def limits(settings: dict) -> str:
    """What the machine was found to do, in a sentence."""
    found = settings["machine"]
    rates = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in found["matrix_tflops"].items())
    copied = f"a copy moves {found['copy_gb_s']:.0f} GB/s" if found["copy_gb_s"] else "copies were not timed"
    return f"Limits of this machine: {copied}{', products do ' + rates if rates else ''}."


def show(doc: dict) -> None:
    """Print the table of a micro run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    env, settings = doc["environment"], doc["settings"]
    gpu = env["kind"] == "cuda"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    peers = [peer for peer in HEADINGS if peer in doc["peers"]]
    for peer in peers:
        table.add_column(HEADINGS[peer], justify="right", style="bold" if peer == "eager" else None)
    for name in ("op", "pass", "dtype", "shape", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "±", "eager ms", "GB/s", "GFLOP/s", "of limit", "peak MB"):
        table.add_column(name, justify="right")
    for row in rows(doc):
        if row["variant"] == "maefast-reference" and not gpu and not row["default"]:
            continue
        rate = row.get("gb_s")
        table.add_row(
            *(times(row["ratios"].get(peer)) for peer in peers),
            *what(row),
            backend(row) + (" *" if row["default"] else ""),
            milliseconds(row["median_s"]),
            spread(row),
            milliseconds(row["times"].get("eager")),
            "-" if rate is None else f"{rate:.0f}",
            gigaflops(row),
            of_limit(row),
            megabytes(row.get("peak_bytes")),
        )
    console = Console(width=None if Console().is_terminal else 170)
    dirty = ", uncommitted changes" if env["dirty"] else ""
    console.print(
        f"{env['device']}, {env['cpu_threads']} threads, torch {env['torch']}, maefast {env['maefast']} at "
        f"{env['commit']}{dirty}. "
        f"Ratio: how many times longer the peer takes. {rounds(settings)} {limits(settings)} "
        "* = chosen automatically.",
        highlight=False,
    )
    console.print(table)
    names, found = further(doc)
    if names:
        more = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("best of all", *(f"vs {name}" for name in names)):
            more.add_column(name, justify="right")
        for name in ("op", "pass", "dtype", "shape", "backend"):
            more.add_column(name, no_wrap=True)
        for row in found:
            ratios = (times(row["ratios"].get(name)) for name in names)
            more.add_row(best(row), *ratios, *what(row), backend(row))
        console.print("Further peers", highlight=False)
        console.print(more)
    for text in failures(doc):
        console.print("not timed: " + text, highlight=False, markup=False)
    if text := left_out(doc):
        console.print(text, highlight=False)
