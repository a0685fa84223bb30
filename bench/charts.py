"""Charts of one machine's results, as PNG: what `maefast bench report` puts beside its tables.

Bars are ratios of the same run, on a logarithmic axis, so that half and twice are equally far from 1; what is below 1
is drawn in another colour. The roofline (Williams, Waterman and Patterson, 2009) holds each op against what the machine
was found to do at the start of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maefast.bench.micro import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most people tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
COLOURS = {"float32": BLUE, "bfloat16": ORANGE}
Bar = tuple[str, float, str]  # label, ratio, dtype


def draw(device: str, docs: list[dict], folder: Path) -> list[tuple[str, Path]]:
    """Write what these results allow; (title, file) of each chart."""
    written = []
    for name, (title, chart) in CHARTS.items():
        figure = chart(docs)
        if figure is None:
            continue
        axes = figure.axes[0]
        lines = [title, device, *filter(None, [axes.get_title()])]
        axes.set_title("\n".join(lines), fontsize=10, pad=26 if axes.get_legend() is None else 8)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        # No date and no version inside: the same results give the same file.
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        written.append((f"{title}, {device}", path))
    return written


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _bars(bars: list[Bar], label: str) -> Figure | None:
    """Horizontal, the first on top, both dtypes of a label on one row."""
    if not bars:
        return None
    names = list(dict.fromkeys(name for name, _, _ in bars))
    figure, axes = _figure(8, 1.2 + 0.28 * len(names))
    for name, value, dtype in bars:
        offset = 0.2 if dtype == "float32" else -0.2
        place = len(names) - 1 - names.index(name) + offset
        below = {"edgecolor": RED, "hatch": "////", "linewidth": 0.8} if value < 0.98 else {}
        axes.barh(place, value - 1, 0.38, left=1, color=COLOURS[dtype], **below)
        side = {"xytext": (3, 0), "ha": "left"} if value >= 1 else {"xytext": (-3, 0), "ha": "right"}
        axes.annotate(f"{value:.2f}", (value, place), textcoords="offset points", fontsize=6.5, va="center", **side)
    axes.set_yticks(range(len(names) - 1, -1, -1), names, fontsize=8)
    axes.set_xscale("log")
    values = [value for _, value, _ in bars]
    axes.set_xlim(min(0.5, min(values) / 1.25), max(2.5, max(values) * 1.25))
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label)
    axes.set_ylim(-0.6, len(names) - 0.4)
    handles = [axes.barh(0, 0, color=COLOURS[dtype]) for dtype in COLOURS]
    figure.legend(
        handles,
        COLOURS,
        ncols=2,
        fontsize=8,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        bbox_transform=axes.transAxes,
    )  # fmt: skip  above the bars, which may be as long as the chart is wide
    return figure


def _kind(docs: list[dict], kind: str) -> list[dict]:
    return [doc for doc in docs if doc["kind"] == kind]


def _models(docs: list[dict], ratio: str) -> list[Bar]:
    """Whole steps: ours, other people's models, recipes. Over the fastest of the uncompiled ways without maefast."""
    bars = []
    for kind, ways, name in (("step", ("plain",), "preset"), ("dropin", ("as_is", "tuned", "written"), "family")):
        for doc in _kind(docs, kind):
            found = [r[ratio] for r in doc["records"] if r["peer"] in ways and ratio in r]
            first = doc["records"][0]
            if found:
                bars.append(
                    (f"{first[name]} ({'accelerated' if kind == 'dropin' else 'step'})", min(found), first["dtype"])
                )
    for doc in _kind(docs, "recipes"):
        for record in doc["records"]:
            value = record["ratio"] if ratio == "ratio" else 1 / record["memory_ratio"]
            bars.append((f"{record['recipe']} (recipe)", value, record["dtype"]))
    return sorted(bars, key=lambda bar: (bar[0].split("(")[1], bar[0], bar[2]))


def models(docs: list[dict]) -> Figure | None:
    return _bars(_models(docs, "ratio"), "time without maefast over the time with it")


def memory(docs: list[dict]) -> Figure | None:
    return _bars(_models(docs, "memory_ratio"), "peak memory without maefast over that with it")


def ops(docs: list[dict]) -> Figure | None:
    """Forward and backward where there is one, at the largest batch of each shape."""
    best: dict[tuple, tuple[int, float]] = {}
    for doc in _kind(docs, "micro"):
        for row in tables.rows(doc, only_default=True):
            peers = [row["ratios"][name] for name in ("eager", "tuned") if name in row["ratios"]]
            key = f"{row['op']}, {row['shape']['name']}", row["dtype"]
            weight = (row["direction"] != "forward", row["shape"]["batch"])
            if peers and weight >= best.get(key, ((False, 0), 0))[0]:
                best[key] = weight, min(peers)
    bars = [(name, value, dtype) for (name, dtype), (_, value) in best.items() if dtype in COLOURS]
    return _bars(bars, "time of the best eager PyTorch over ours")


def roofline(docs: list[dict]) -> Figure | None:
    """Rate against intensity, with the machine's two limits; ops without FLOPs to speak of are in the tables alone."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    limits = None
    for doc in _kind(docs, "micro"):
        if not doc["settings"]["machine"]["matrix_tflops"]:
            continue
        limits = doc["settings"]["machine"]
        for row in tables.rows(doc, only_default=True):
            if row.get("flops") and row.get("min_bytes"):
                rate = row["flops"] / row["median_s"] / 1e9
                points.setdefault(row["dtype"], []).append(
                    (row["flops"] / row["min_bytes"], rate, row["op"].split(" (")[0])
                )
    if limits is None or not points:
        return None
    figure, axes = _figure(8, 5.5)
    markers = dict(zip(sorted({op for rows in points.values() for _, _, op in rows}), "osD^vP*XhH<>"))
    for dtype, rows in points.items():
        top = limits["matrix_tflops"].get(dtype)
        if top:
            low, high = min(x for x, _, _ in rows) / 2, max(x for x, _, _ in rows) * 2
            knee = top * 1e3 / limits["copy_gb_s"]
            line = [(x, min(top * 1e3, x * limits["copy_gb_s"])) for x in (low, knee, max(high, knee * 2))]
            axes.plot(*zip(*line), color=COLOURS[dtype], linewidth=1.2, label=f"limit, {dtype}: {top:.3g} TFLOP/s")
        for op, marker in markers.items():
            some = [(x, y) for x, y, name in rows if name == op]
            if some:
                axes.scatter(*zip(*some), s=26, marker=marker, color=COLOURS[dtype], alpha=0.75, linewidths=0)
    for op, marker in markers.items():
        axes.scatter([], [], s=26, marker=marker, color=GREY, label=op)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"FLOPs for each byte that must move (a copy moves {limits['copy_gb_s']:.0f} GB/s)")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, ncols=2)
    return figure


def visible(docs: list[dict]) -> Figure | None:
    """An encoder's time against the share of visible tokens, with the line through the origin and 100 %."""
    figure = None
    for doc in _kind(docs, "scaling"):
        batch, dtype = doc["settings"]["batch"], doc["records"][0]["dtype"]
        for peer, style in (("maefast", "-o"), ("plain", "--s")):
            rows = sorted(
                (r["visible"] / r["tokens"], r) for r in doc["records"] if r["peer"] == peer and r["batch"] == batch
            )
            if not rows:
                continue
            if figure is None:
                figure, axes = _figure(7, 4.6)
            x, y = [100 * share for share, _ in rows], [r["median_s"] * 1e3 for _, r in rows]
            spread = [
                [(r["median_s"] - r["low_s"]) * 1e3 for _, r in rows],
                [(r["high_s"] - r["median_s"]) * 1e3 for _, r in rows],
            ]
            axes.errorbar(x, y, spread, fmt=style, markersize=4, color=COLOURS[dtype], label=f"{peer}, {dtype}",
                          alpha=1 if peer == "maefast" else 0.55)  # fmt: skip
            if peer == "maefast" and x[-1] == 100:
                axes.plot([0, 100], [0, y[-1]], ":", color=COLOURS[dtype], linewidth=1, label=f"ideal, {dtype}")
            axes.set_title(f"{doc['settings']['model']}, batch {batch}: {doc['settings']['part']}", fontsize=9)
    if figure is not None:
        axes.set_xlabel("visible tokens, % of all")
        axes.set_ylabel("ms")
        axes.set_xlim(0, 103)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def batches(docs: list[dict]) -> Figure | None:
    """Samples a second against the batch, at a quarter of the tokens."""
    figure = None
    for doc in _kind(docs, "scaling"):
        dtype = doc["records"][0]["dtype"]
        for peer, style in (("maefast", "-o"), ("plain", "--s")):
            some = [r for r in doc["records"] if r["peer"] == peer and round(100 * r["visible"] / r["tokens"]) == 25]
            rows = sorted((r["batch"], r["batch"] / r["median_s"]) for r in some)
            if len(rows) < 2:
                continue
            if figure is None:
                figure, axes = _figure(7, 4.2)
            axes.plot(*zip(*rows), style, markersize=4, color=COLOURS[dtype], alpha=1 if peer == "maefast" else 0.55,
                      label=f"{peer}, {dtype}")  # fmt: skip
            axes.set_title(
                f"{doc['settings']['model']}, 25 % of the tokens visible: {doc['settings']['part']}", fontsize=9
            )
    if figure is not None:
        axes.set_xscale("log", base=2)
        sizes = sorted({r["batch"] for doc in _kind(docs, "scaling") for r in doc["records"]})
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xlabel("batch")
        axes.set_ylabel("samples a second")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


CHARTS: dict[str, tuple[str, Callable[[list[dict]], Any]]] = {
    "models": ("Speed-up of whole steps", models),
    "memory": ("Memory of whole steps", memory),
    "ops": ("Speed-up of ops", ops),
    "roofline": ("Ops against the limits of the machine", roofline),
    "visible": ("Time against visible tokens", visible),
    "batches": ("Throughput against batch", batches),
}
