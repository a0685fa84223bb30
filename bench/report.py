"""Turns bench/results/*.json into the tables of docs/results.md, so that no figure is typed by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maefast.bench import results
from maefast.bench.dropin import compiled
from maefast.bench.environment import ROOT
from maefast.bench.micro import tables
from maefast.bench.peers import dropin_models, models
from maefast.bench.step import graphed

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- begin: written by python -m maefast.bench.report -->", "<!-- end -->"
# The aims that figures are held against.
AIM_CPU, AIM_GPU = 2.0, 0.85
AIM_STEP = {
    "vit_b": {"float32": 2.3, "bfloat16": 1.35},
    "fcmae_t": {"float32": 2.0},
    "spark_r50": {"float32": 1.3},
    "spark_r50_encoder": {"float32": 1.7},
    "spark_cs_encoder": {"float32": 2.0},
}
# Over the model as it is (its fastest way), both eager; for MAE in float32 on other processors than AMD's, 1.2.
AIM_DROPIN = {
    "cpu": {
        "hf_vitmae": {"float32": 2.2, "bfloat16": 1.35},
        "mae": {"float32": 2.2, "bfloat16": 1.35},
        "hf_videomae": {"float32": 1.5, "bfloat16": 1.5},
        "videomae": {"float32": 1.5, "bfloat16": 1.5},
        "spark": {"float32": 1.3},
        "fcmae": {"float32": 2.0},
    },
    "cuda": {
        "hf_vitmae": {"bfloat16": 1.6},
        "mae": {"bfloat16": 1.6},
        "hf_videomae": {"bfloat16": 1.7},
        "videomae": {"bfloat16": 1.7},
    },
}
AIM_COMPILED = 1.2  # the same, compiled against compiled, on a GPU


def load(folder: Path) -> list[dict]:
    """All results, less the cases that the same machine has measured anew in a later file."""
    docs = [{**results.read(path), "file": path.name} for path in sorted(folder.glob("*.json"))]
    seen: dict[tuple, set] = {}
    for doc in sorted(docs, key=lambda doc: (doc["environment"]["date"], doc["file"]), reverse=True):
        env = doc["environment"]
        where = doc["kind"], env["kind"], env["device"], env["cpu_threads"] if env["kind"] == "cpu" else None
        old = seen.setdefault(where, set())
        doc["records"] = [record for record in doc["records"] if _case(doc["kind"], record) not in old]
        old |= {_case(doc["kind"], record) for record in doc["records"]}
    return [doc for doc in docs if doc["records"]]


def _case(kind: str, record: dict) -> tuple:
    if kind == "micro":
        return tables.key(record)
    return record.get("family"), record["preset"], record["shape"]["batch"], record["dtype"]


def render(docs: list[dict]) -> str:
    """The generated part of the page."""
    parts = []
    for kind, name in (("cpu", "CPU"), ("cuda", "GPU")):
        parts.append(f"## {name}\n")
        found = [doc for doc in docs if doc["environment"]["kind"] == kind]
        if not found:
            parts.append(f"{name} figures are not measured yet.\n")
            continue
        sections = (
            ("step", "One training step", step),
            ("dropin", "Drop-in: one training step of other people's models", dropin),
            ("micro", "Token ops", micro),
        )
        for what, title, section in sections:
            parts.append(f"### {title}\n")
            mine = [doc for doc in found if doc["kind"] == what]
            parts += [section(doc) for doc in mine] or ["Not measured yet.\n"]
    return "\n".join(parts)


def machine(doc: dict) -> str:
    """Everything a figure must name."""
    env = doc["environment"]
    changes = {True: ", with uncommitted changes", False: "", None: ", state of the tree unknown"}[env["dirty"]]
    words = [env["device"]]
    if env["kind"] == "cuda":
        words.append(f"CUDA {env.get('cuda')}, driver {env.get('driver')}")
    else:
        words.append(f"{env['cpu_threads']} threads, kernels {env.get('isa')}")
    words.append(f"torch {env['torch']}, triton {env['triton']}")
    if doc["kind"] != "micro":
        words.append(f"transformers {env.get('transformers')}")
    words.append(f"maefast {env['maefast']} at {env['commit']}{changes}")
    words.append(env["date"])
    return "; ".join(words) + f" (`bench/results/{doc['file']}`)."


def markdown(headings: list[str], rows: list[list[str]], left: int) -> str:
    """A table whose first columns are figures (right), the `left` columns after them words."""
    figures = len(headings) - left
    rule = ["---:"] * figures + ["---"] * left
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows)) + "\n"


def step(doc: dict) -> str:
    first = doc["records"][0]
    patch = "x".join(map(str, first["shape"]["patch_size"]))
    encoder = "; encoder alone, forward and backward" if doc["settings"].get("part") == "encoder" else ""
    text = f"**{first['preset']}**: {_size(first)} images, patch {patch}, {_batch(first)}{encoder}. "
    text += peers_table(doc, models.NAMES)
    text += "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in graphed(doc["records"]))
    plain = next((r for r in doc["records"] if r["peer"] == "plain" and "error" not in r), None)
    aim = AIM_STEP.get(first["preset"], {}).get(first["dtype"])
    if plain and aim and plain["ratio"] < aim:
        text += f"\nShort of the aim of {aim}x over the plain eager model.\n"
    return text + "\n" + machine(doc) + "\n"


def dropin(doc: dict) -> str:
    """One model as it is and accelerated."""
    settings, records, env = doc["settings"], doc["records"], doc["environment"]
    first = records[0]
    code = settings["code"] if settings["origin"] == "package" else f"`{settings['code']}`"
    images = "videos" if len(first["shape"]["img_size"]) == 3 else "images"
    text = f"**{settings['title']}, {first['preset']}** ({code}): {_size(first)} {images}, {_batch(first)}"
    text += f"{', channels-last' if settings['channels_last'] else ''}. "
    text += peers_table(doc, dropin_models.NAMES)
    text += "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in compiled(records))
    timed = {r["peer"]: r for r in records if "error" not in r}
    aim = AIM_DROPIN[env["kind"]].get(first["family"], {}).get(first["dtype"])
    if aim and first["dtype"] == "float32" and first["family"] in ("mae", "hf_vitmae") and "AMD" not in env["cpu"]:
        aim = 1.2
    best = min(timed[name]["ratio"] for name in ("as_is", "tuned", "written") if name in timed)
    if first["preset"] == "base" and aim and best < aim:
        text += f"\nShort of the aim of {aim}x over the model as it is ({best:.2f}x).\n"
    names = ("as_is_compiled", "tuned_compiled", "written_compiled")
    ratios = [timed[name]["ratio_compiled"] for name in names if "ratio_compiled" in timed.get(name, {})]
    if env["kind"] == "cuda" and first["preset"] == "base" and ratios and min(ratios) < AIM_COMPILED:
        text += f"\nShort of the aim of {AIM_COMPILED}x, compiled against compiled ({min(ratios):.2f}x).\n"
    return text + "\n" + machine(doc) + "\n"


def _size(record: dict) -> str:
    return "x".join(map(str, record["shape"]["img_size"]))


def _batch(record: dict) -> str:
    return f"batch {record['shape']['batch']}, {record['dtype']}{' autocast' if record['dtype'] != 'float32' else ''}"


def peers_table(doc: dict, names: dict[str, str]) -> str:
    """Rounds, then one row a peer, the fastest first; the first record's peer is what ratios are about."""
    records = doc["records"]
    ours = names[records[0]["peer"]]
    timed = sorted((r for r in records if "error" not in r), key=lambda r: r["ratio"])
    rows = []
    for r in timed:
        one = r is records[0]
        rows.append(
            [
                "1" if one else f"{r['ratio']:.2f}x",
                "1" if one else f"{r['memory_ratio']:.2f}x",
                f"{r['step_s'] * 1e3:.1f}",
                f"{r['low_s'] * 1e3:.1f}-{r['high_s'] * 1e3:.1f}",
                f"{r['images_per_s']:.1f}",
                f"{r['peak_bytes'] / 2**20:.0f}",
                f"{r['step_bytes'] / 2**20:.0f}" if "step_bytes" in r else "-",
                f"{r['first_loss']:.6f}",
                names[r["peer"]],
            ]
        )
    text = f"Medians of {timed[0]['rounds']} rounds of {doc['settings']['steps_a_round']} steps.\n\n"
    heads = [
        f"time vs {ours}",
        f"memory vs {ours}",
        "step ms",
        "quartiles",
        "images/s",
        "peak MB",
        "MB a step",
        "first loss",
    ]
    text += markdown([*heads, "model"], rows, 1)
    for r in records:
        if "error" in r:
            text += f"\nNot timed: {names[r['peer']]} ({r['error']}).\n"
    return text


def micro(doc: dict) -> str:
    gpu = doc["environment"]["kind"] == "cuda"
    peers = [peer for peer in tables.HEADINGS if peer in doc["peers"]]
    heads = [tables.HEADINGS[peer] for peer in peers] + ["ms", "eager ms", "GB/s", "of copy"]
    rows, short = [], []
    for row in tables.rows(doc, only_default=not gpu):
        if gpu and row["variant"] == "maefast-reference":
            continue
        share, rate = row.get("copy_share"), row.get("gb_s")
        way = "forward" if row["direction"] == "forward" else "forward + backward"
        shape = f"{row['shape']['name']} b{row['shape']['batch']}"
        backend = tables.backend(row) + (" (default)" if gpu and row["default"] else "")
        rows.append(
            [
                *(tables.times(row["ratios"].get(peer)) for peer in peers),
                tables.milliseconds(row["median_s"]),
                tables.milliseconds(row["times"].get("eager")),
                "-" if rate is None else f"{rate:.0f}",
                "-" if share is None else f"{share:.0%}",
                row["op"],
                way,
                row["dtype"],
                shape,
                backend,
            ]
        )
        ratio = row["ratios"].get("eager")
        if gpu and share is not None and share < AIM_GPU and row["default"]:
            short.append(f"{row['op']} {way} {row['dtype']} {shape} ({share:.0%})")
        elif not gpu and ratio is not None and ratio < _aim(row):
            short.append(f"{row['op']} {way} {row['dtype']} {shape} ({ratio:.2f}x)")
    settings = doc["settings"]
    text = f"Medians of {settings['rounds']} rounds. A copy on this machine moves {settings['copy_gb_s']:.0f} GB/s, "
    text += "bytes read plus bytes written.\n\n" + markdown(
        [*heads, "op", "pass", "dtype", "shape", "backend"], rows, 5
    )
    text += further(doc)
    aim = f"{AIM_GPU:.0%} of copy bandwidth" if gpu else f"{AIM_CPU:.0f}x over eager (attention: 1.5x, bfloat16 3x)"
    text += f"\nShort of the aim of {aim}: {'; '.join(short) if short else 'none'}.\n"
    if "linear_library" in settings:
        text += f"\n`ops.linear` chose the library {settings['linear_library']!r} here.\n"
    if settings["cases_left_out"]:
        text += f"\n{settings['cases_left_out']} cases were left out for time.\n"
    for line in tables.failures(doc):
        text += f"\nNot timed: {line}.\n"
    return text + "\n" + machine(doc) + "\n"


def _aim(row: dict) -> float:
    """Over eager, on a CPU."""
    if row["op"].startswith("attention"):
        return 1.5 if row["dtype"] == "float32" else 3.0
    return AIM_CPU


def further(doc: dict) -> str:
    """The table of the peers that only some ops have, or nothing."""
    names, found = tables.further(doc)
    if not names:
        return ""
    heads = ["best of all peers", *(f"vs {name}" for name in names), "op", "pass", "dtype", "shape", "backend"]
    lines = []
    for row in found:
        ratios = (tables.times(row["ratios"].get(name)) for name in names)
        lines.append([tables.best(row), *ratios, *tables.what(row), tables.backend(row)])
    return "\nFurther peers (the automatic or default backend beside them):\n\n" + markdown(heads, lines, 5)


def write(page: Path, docs: list[dict], check: bool = False) -> bool:
    """Replace what stands between the markers; returns whether the page was up to date already."""
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}")
    new = f"{head}{BEGIN}\n\n{render(docs)}\n{END}{tail}"
    if new != text and not check:
        page.write_text(new)
    return new == text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say (by exit status 1) if the page is out of date")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    fresh = write(args.page, load(args.results), args.check)
    if args.check and not fresh:
        print(f"{args.page} does not show {args.results}: run python -m maefast.bench.report", file=sys.stderr)
        return 1
    print(f"{args.page}: " + ("up to date" if fresh else "written"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
