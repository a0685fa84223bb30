"""The short tables of README.md: one row a model, how long it takes without maefast over the time with it."""

from __future__ import annotations

from collections.abc import Iterable

OWN = ("as_is", "tuned", "written")  # other people's models, the ways of their attention: the fastest counts
DTYPES = ("float32", "bfloat16")
MARK = " †"
_WHAT = {
    "dropin": "other people's models, as they are over accelerated",
    "step": "the same model in plain PyTorch over maefast's",
}


def tables(now: list[dict], earlier: list[dict], page: str) -> str:
    """Markdown for each CPU that whole steps were measured on. `page`: where figures of earlier code are explained."""
    now, earlier = ([doc for doc in docs if _row(doc)] for docs in (now, earlier))
    parts = []
    for device in sorted({doc["environment"]["device"] for doc in (*now, *earlier)}):
        new, old = ([doc for doc in docs if doc["environment"]["device"] == device] for docs in (now, earlier))
        threads, torch = (_all(key, (*new, *old)) for key in ("cpu_threads", "torch"))
        text = f"**{device}**, {threads} threads, torch {torch}, "
        ago = f"measured with [earlier code]({page}), at {_all('commit', old)}"
        text += f"at {_all('commit', new)}.\n" if new else f"{ago}.\n"
        mine = [(doc, MARK if new else "") for doc in old] + [(doc, "") for doc in new]
        for kind, what in _WHAT.items():
            text += _table(what, [(doc, mark) for doc, mark in mine if doc["kind"] == kind])
        parts.append(text + (f"\n†: {ago}.\n" if new and old else ""))
    return "\n".join(parts) or "No whole step has been measured on a CPU yet.\n"


def _all(key: str, docs: Iterable[dict]) -> str:
    return ", ".join(dict.fromkeys(str(doc["environment"][key]) for doc in docs))


def _table(what: str, docs: list[tuple[dict, str]]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for doc, mark in docs:
        if row := _row(doc):
            name, cell = row
            rows.setdefault(name, {})[doc["records"][0]["dtype"]] = cell + mark
    if not rows:
        return ""
    lines = [[name, *(of.get(dtype, "-") for dtype in DTYPES)] for name, of in sorted(rows.items())]
    head = [[what, "float32", "bfloat16 autocast"], ["---", "---:", "---:"]]
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in (*head, *lines))


def _row(doc: dict) -> tuple[str, str] | None:
    """(model, figures); None of what is no step on a CPU, of a toy, and of a result without a peer."""
    first = doc["records"][0]
    if doc["kind"] not in _WHAT or doc["environment"]["kind"] != "cpu" or "toy" in first["preset"]:
        return None
    found = {record["peer"]: record for record in doc["records"] if "error" not in record}
    others = [found[name] for name in (OWN if doc["kind"] == "dropin" else ("plain",)) if name in found]
    if not others or first["peer"] not in found:
        return None
    best = min(others, key=lambda record: record["ratio"])
    size = "x".join(map(str, first["shape"]["img_size"]))
    name = doc["settings"]["title"] if doc["kind"] == "dropin" else f"`{first['preset']}`"
    if doc["settings"].get("part") == "encoder":
        name += ", encoder alone"
    cell = f"{best['ratio']:.2f}x"
    more = []
    if abs(best["memory_ratio"] - 1) >= 0.1:
        more.append(f"{best['memory_ratio']:.2f}x the memory")
    if doc["kind"] == "step" and "hf" in found:
        more.append(f"HF ViTMAE {found['hf']['ratio']:.2f}x")
    compiled = [r["ratio_compiled"] for r in found.values() if r["peer"].startswith(OWN) and "ratio_compiled" in r]
    if compiled:
        more.append(f"both compiled {min(compiled):.2f}x")
    return f"{name}, {size}, batch {first['shape']['batch']}", cell + (f" ({', '.join(more)})" if more else "")
