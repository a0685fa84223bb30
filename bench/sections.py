"""The tables of docs/results.md: one function for each kind of result."""

from __future__ import annotations

from collections.abc import Callable

from maefast.bench.dropin import compiled
from maefast.bench.micro import tables
from maefast.bench.peers import dropin_models, models
from maefast.bench.step import graphed

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
AIM_VOLUMES = 1.5


def case(kind: str, record: dict) -> tuple:
    """What a record measured: a later one of the same machine replaces it."""
    if kind == "micro":
        return tables.key(record)
    if kind in ("step", "dropin"):
        return record.get("family"), record["preset"], record["shape"]["batch"], record["dtype"]
    names = ("recipe", "size", "model", "side", "workers", "width", "batch", "visible", "tokens", "depth", "dtype")
    return tuple(record.get(name) for name in names)


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
    return "; ".join(words) + f" (`{doc['file']}`)."


def markdown(headings: list[str], rows: list[list[str]], left: int) -> str:
    """A table whose first columns are figures (right), the `left` columns after them words."""
    figures = len(headings) - left
    rule = ["---:"] * figures + ["---"] * left
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows)) + "\n"


def each(section: Callable[[dict], str]) -> Callable[[list[dict]], str]:
    """A section of several files: one after the other."""
    return lambda docs: "\n".join(section(doc) for doc in docs)


# --- steps ------------------------------------------------------------------------------------------------------------


@each
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
        reached = f"{plain['ratio']:.2f}x{allowed(first, plain['ratio'])}"
        text += f"\nShort of the aim of {aim}x over the plain eager model ({reached}).\n"
    return text + "\n" + machine(doc) + "\n"


@each
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
        text += f"\nShort of the aim of {aim}x over the model as it is ({best:.2f}x{allowed(first, best)}).\n"
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
                tables.of_limit(r),
                f"{r['images_per_s']:.1f}",
                f"{r['peak_bytes'] / 2**20:.0f}",
                f"{r['step_bytes'] / 2**20:.0f}" if "step_bytes" in r else "-",
                f"{r['first_loss']:.6f}",
                names[r["peer"]],
            ]
        )
    processes = timed[0].get("processes", 1)
    spread = f", in {processes} processes of each, one after the other" if processes > 1 else ""
    text = f"Medians of {timed[0]['rounds']} rounds of {doc['settings']['steps_a_round']} steps{spread}.\n\n"
    heads = [
        f"time vs {ours}",
        f"memory vs {ours}",
        "step ms",
        "quartiles",
        "of limit",
        "images/s",
        "peak MB",
        "MB a step",
    ]
    text += markdown([*heads, "first loss", "model"], rows, 1)
    for r in records:
        if "error" in r:
            text += f"\nNot timed: {names[r['peer']]} ({r['error']}).\n"
    return text


# --- ops --------------------------------------------------------------------------------------------------------------


@each
def micro(doc: dict) -> str:
    gpu = doc["environment"]["kind"] == "cuda"
    peers = [peer for peer in tables.HEADINGS if peer in doc["peers"]]
    heads = [tables.HEADINGS[peer] for peer in peers]
    heads += [
        "ms",
        "±",
        "eager ms",
        "GB/s",
        "GFLOP/s",
        "of limit",
        "peak MB",
        "op",
        "pass",
        "dtype",
        "shape",
        "backend",
    ]
    rows, short, out_of_reach = [], [], []
    for row in tables.rows(doc, only_default=not gpu):
        if gpu and row["variant"] == "maefast-reference":
            continue
        share, rate = row.get("limit_share"), row.get("gb_s")
        way = "forward" if row["direction"] == "forward" else "forward + backward"
        shape = f"{row['shape']['name']} b{row['shape']['batch']}"
        backend = tables.backend(row) + (" (default)" if gpu and row["default"] else "")
        rows.append(
            [
                *(tables.times(row["ratios"].get(peer)) for peer in peers),
                tables.milliseconds(row["median_s"]),
                tables.spread(row),
                tables.milliseconds(row["times"].get("eager")),
                "-" if rate is None else f"{rate:.0f}",
                tables.gigaflops(row),
                tables.of_limit(row),
                tables.megabytes(row.get("peak_bytes")),
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
            beyond = most(row, ratio) is not None and most(row, ratio) < _aim(row)
            (out_of_reach if beyond else short).append(
                f"{row['op']} {way} {row['dtype']} {shape} ({ratio:.2f}x{allowed(row, ratio)})"
            )
    settings = doc["settings"]
    text = f"{tables.rounds(settings)} {tables.limits(settings)}\n\n" + markdown(heads, rows, 5)
    text += further(doc)
    aim = f"{AIM_GPU:.0%} of the limit" if gpu else f"{AIM_CPU:.0f}x over eager (attention: 1.5x, bfloat16 3x)"
    text += f"\nShort of the aim of {aim}: {'; '.join(short) if short else 'none'}.\n"
    if out_of_reach:
        text += f"\nShort of it where the limit of this machine does not allow it: {'; '.join(out_of_reach)}.\n"
    if "linear_library" in settings:
        text += f"\n`ops.linear` chose the library {settings['linear_library']!r} here.\n"
    text += _left_out(doc)
    for line in tables.failures(doc):
        text += f"\nNot timed: {line}.\n"
    return text + "\n" + machine(doc) + "\n"


def _left_out(doc: dict) -> str:
    text = tables.left_out(doc)
    return f"\n{text}\n" if text else ""


def most(record: dict, ratio: float) -> float | None:
    """What a ratio of ours could be if we needed no more than the machine's limit; None where that is unknown."""
    share = record.get("limit_share")
    return ratio / share if share else None


def allowed(record: dict, ratio: float) -> str:
    """That in words, to be put behind the ratio. Data that stay in a cache pass the limit of memory."""
    possible = most(record, ratio)
    if possible is None:
        return ""
    return f"; the limit allows {possible:.2f}x" if possible > ratio else "; beyond the limit of memory"


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


# --- recipes and the rest ---------------------------------------------------------------------------------------------


def recipes(docs: list[dict]) -> str:
    """All recipes of a machine in one table, both dtypes in a row."""
    found: dict[tuple, dict[str, tuple[dict, dict]]] = {}
    for doc in docs:
        for record in doc["records"]:
            found.setdefault((record["recipe"], record["size"], record["batch"]), {})[record["dtype"]] = record, doc
    dtypes = [dtype for dtype in ("float32", "bfloat16") if any(dtype in of for of in found.values())]
    rows, ways = [], []
    for (name, size, batch), of in sorted(found.items()):
        row = []
        for dtype in dtypes:
            if dtype not in of:
                row += ["-"] * 7
                continue
            r = of[dtype][0]
            row += [f"{r['ratio']:.2f}x", f"{r['ms'][0]:.0f}", f"{r['ms'][1]:.0f}"]
            row += [f"{r['memory_ratio']:.2f}x", f"{r['memory_mib'][0]:.0f}", f"{r['memory_mib'][1]:.0f}"]
            row.append(tables.of_limit(r))
            ways += [[f"{value:.2f}x", name, dtype, way] for way, value in r["other_ways"].items()]
        commits = dict.fromkeys(str(doc["environment"]["commit"]) for _, doc in of.values())
        rows.append([*row, name, f"{size}, batch {batch}", ", ".join(commits)])
    one = ["time", "plain ms", "ours ms", "memory", "plain MiB", "ours MiB", "of limit"]
    heads = [f"{'' if dtype == 'float32' else 'bf16 '}{head}" for dtype in dtypes for head in one]
    env = docs[0]["environment"]
    text = f"{env['device']}, {env['cpu_threads']} threads, torch {env['torch']}; the commit stands in each row.\n\n"
    text += markdown([*heads, "recipe", "size", "commit"], rows, 3)
    if ways:
        text += "\nThe same kernels in the usual way, over the way that the recipe takes:\n\n"
        text += markdown(["time saved", "recipe", "dtype", "usual way"], ways, 3)
    return text


def scaling(docs: list[dict]) -> str:
    parts = []
    for doc in docs:
        rows = []
        for r in doc["records"]:
            if r["peer"] == "maefast":
                other = next(
                    o for o in doc["records"] if o["peer"] != "maefast" and case("scaling", o) == case("scaling", r)
                )
                times = (f"{each['median_s'] * 1e3:.0f} ± {tables.spread(each)}" for each in (r, other))
                memory = [tables.megabytes(each["peak_bytes"]) for each in (r, other)]
                memory.append(tables.of_limit(r))
                rows.append(
                    [f"{r['visible'] / r['tokens']:.0%}", str(r["batch"]), f"{other['ratio']:.2f}x", *times, *memory]
                )
        heads = [
            "visible",
            "batch",
            "plain over ours",
            "ours ms",
            "plain ms",
            "ours peak MB",
            "plain peak MB",
            "of limit",
        ]
        settings, dtype = doc["settings"], doc["records"][0]["dtype"]
        text = f"**{settings['model']}**, {settings['part']}, {dtype}, medians of {settings['rounds']} rounds.\n\n"
        parts.append(text + markdown(heads, rows, 0) + _left_out(doc) + "\n" + machine(doc) + "\n")
    return "\n".join(parts)


@each
def volumes(doc: dict) -> str:
    first = doc["records"][0]
    text = f"A 3-D ResNet's encoder on {first['side']}^3 voxels, {first['mask_ratio']:.0%} masked, "
    text += f"batch {first['batch']}, {first['dtype']}, forward and backward, "
    text += f"least of {doc['settings']['rounds']} rounds.\n\n"
    rows = [
        [
            f"{r['ratio']:.2f}x",
            f"{r['best_s']:.2f}",
            tables.of_limit(r),
            tables.megabytes(r.get("peak_bytes")),
            r["peer"],
        ]
        for r in doc["records"]
    ]
    text += markdown(["time vs maefast", "s", "of limit", "peak MB", "network"], rows, 1)
    best = min(r["ratio"] for r in doc["records"][1:])
    if best < AIM_VOLUMES:
        text += f"\nShort of the aim of {AIM_VOLUMES}x ({best:.2f}x).\n"
    return text + "\n" + machine(doc) + "\n"


@each
def block(doc: dict) -> str:
    eager = {case("block", r): r for r in doc["records"] if r["peer"] == "eager"}
    rows = []
    for r in doc["records"]:
        if r["peer"] == "maefast":
            other = eager[case("block", r)]
            kept = f"{r['kept_bytes'] / other['kept_bytes']:.2f}x"
            what = f"{r['depth']} deep, {r['width']} wide, {r['batch']} x {r['tokens']} tokens"
            rows.append(
                [
                    f"{r['time_to_eager']:.2f}x",
                    f"{r['best_s'] * 1e3:.3g}",
                    tables.of_limit(r),
                    kept,
                    r["dtype"],
                    f"{what}, {r['threads']} threads",
                ]
            )
    heads = ["time to eager", "ms", "of limit", "kept for backward, to eager", "dtype", "blocks"]
    return markdown(heads, rows, 2) + _left_out(doc) + "\n" + machine(doc) + "\n"


@each
def toys(doc: dict) -> str:
    rows = [
        [f"{r['ratio']:.2f}x", *(f"{ms:.2f}" for ms in r["ms"]), tables.of_limit(r), r["dtype"], r["model"]]
        for r in doc["records"]
    ]
    text = f"{doc['environment']['cpu_threads']} threads, least of {doc['settings']['rounds']} rounds.\n\n"
    heads = ["as it is over accelerated", "as it is, ms", "accelerated, ms", "of limit", "dtype", "model"]
    return text + markdown(heads, rows, 2) + _left_out(doc) + "\n" + machine(doc) + "\n"


@each
def data(doc: dict) -> str:
    one_core = {r["side"]: r["images_per_s"] for r in doc["records"] if not r["workers"]}
    ours, decoding = one_core["maefast"], one_core.get("decode, simplejpeg")
    rows = []
    for r in doc["records"]:
        processes = f"{r['workers']} loader processes" if r["workers"] else "one core, in the main process"
        rows.append(
            [
                f"{r['images_per_s']:.0f}",
                f"{ours / r['images_per_s']:.2f}x" if not r["workers"] else "-",
                f"{r['images_per_s'] / decoding:.0%}" if decoding and not r["workers"] else "-",
                r["side"],
                processes,
            ]
        )
    heads = ["images/s", "ours over it", "of decoding alone", "loader", "where"]
    return markdown(heads, rows, 2) + "\n" + machine(doc) + "\n"
