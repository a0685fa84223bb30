"""`maefast bench`: what can be run, and running it.

Each benchmark is a module with a `main` of its own, run in a fresh process; this table names it, says what it measures,
and gives the arguments of its short and its whole form. Whatever else is typed is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maefast.errors import TrainError

DEFAULT = Path("out", "bench")  # below the working directory
TOKENS = ["mask", "embed", "restore", "linear", "norm", "gelu", "adamw", "loss", "points", "chamfer", "feature_loss"]
TOKENS += ["resize"]
CELLS = ["cells", "pool", "cell_norm", "depthwise", "sparse_conv", "conv_transpose"]
DTYPES = ("float32", "bfloat16")
Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """quick, full: the arguments of each run."""

    module: str
    what: str
    quick: tuple[Arguments, ...] = ((),)
    full: tuple[Arguments, ...] = ((),)


def _ops(label: str, families: list[str]) -> tuple[tuple[Arguments, ...], tuple[Arguments, ...]]:
    chosen = ("--family", *families)
    shared = ("--label", label, *chosen)
    return (("--preset", "quick", "--no-compile", *shared),), (("--preset", "full", *shared),)


def _each(option: str, values: tuple[str, ...], *more: str) -> tuple[Arguments, ...]:
    return tuple((option, value, "--dtype", dtype, *more) for value in values for dtype in DTYPES)


CONVNETS = ("fcmae_t", "spark_r50", "spark_r50_encoder", "spark_cs_encoder")
FAMILIES = ("hf_vitmae", "mae", "hf_videomae", "videomae", "timm", "jepa", "lightly", "crossmae", "mae_st", "audiomae")
FAMILIES += ("hf_beit", "hf_dinov3", "hf_vjepa2", "hf_swin", "spark", "fcmae")
BENCHMARKS = {
    "ops": Benchmark("micro", "token ops beside eager, tuned and compiled PyTorch", *_ops("ops", TOKENS)),
    "attention": Benchmark(
        "micro", "attention beside SDPA, varlen, FlexAttention, xformers", *_ops("attention", ["attention"])
    ),
    "cells": Benchmark("micro", "ops of masked convnets beside dense times mask", *_ops("cells", CELLS)),
    "step": Benchmark(
        "step",
        "one training step: ours, plain PyTorch, Hugging Face",
        (("--preset", "demo"),),
        (
            ("--preset", "demo"),
            *_each("--preset", ("vit_b",), "--compile"),
            *(("--preset", name) for name in CONVNETS),
        ),
    ),
    "dropin": Benchmark(
        "dropin",
        "other people's models, as they are and accelerated",
        (("--family", "hf_vitmae", "--rounds", "3", "--steps", "1"),),
        (*_each("--family", FAMILIES[:-2]), *(("--family", name) for name in FAMILIES[-2:])),
    ),
    "recipes": Benchmark(
        "recipes",
        "published systems at their sizes beside plain PyTorch",
        (("--quick",),),
        tuple(("--dtype", dtype) for dtype in DTYPES),
    ),
    "data": Benchmark("data", "loaders of photographs, one core", (("--rounds", "1"),), ((),)),
    "scaling": Benchmark(
        "scaling",
        "an encoder's time against visible tokens and batch",
        (("--quick",),),
        tuple(("--dtype", dtype) for dtype in DTYPES),
    ),
    "block": Benchmark("block", "a transformer block, time and what it keeps", (("--rounds", "2"),), ((),)),
    "volumes": Benchmark(
        "volumes",
        "a 3-D ResNet on the visible cells of a volume",
        (("--side", "64", "--batch", "1", "--rounds", "1"),),
        tuple(("--batch", "1", "--dtype", dtype) for dtype in DTYPES),
    ),
    "toys": Benchmark(
        "toys",
        "models too small for kernels: none may get slower",
        (("--rounds", "5"),),
        (("--threads", "1"), ()),
    ),
}
# Of maintainers: no results for docs/results.md, or files of their own.
TOOLS = {
    "report": Benchmark("report", "results to tables and charts"),
    "compare": Benchmark("compare", "what moved between two runs, beyond the noise"),
    "evidence": Benchmark("evidence", "no speed: whether pre-training teaches anything"),
    "finetuning": Benchmark("finetuning", "no speed: whether fine-tuning gains from it"),
    "names": Benchmark("names", "what the names of a large data set cost"),
    "worth": Benchmark("worth", "from which size on an accelerated block pays"),
}


def listing() -> Iterator[str]:
    """One screen: what can be run."""
    yield "maefast bench NAME [--quick | --full] [--device cpu|cuda] [--dtype ...] [--peers ...] [--results FOLDER]"
    yield ""
    for name, item in BENCHMARKS.items():
        yield f"  {name:10} {item.what}"
    yield f"  {'all':10} every one of these, in turn"
    yield ""
    for name, item in TOOLS.items():
        yield f"  {name:10} {item.what}"
    yield ""
    yield "--quick (the default) for a first look, in minutes; --full for what docs/results.md shows, in hours."
    yield "maefast bench NAME --help has each one's own options."
    yield f"Results are JSON, in {DEFAULT}/DEVICE unless --results or --json says otherwise."


def run(name: str | None, arguments: list[str], say: Callable[[str], None]) -> int:
    """List what there is (name=None), or run one. Returns the exit status: the first of its runs that is not 0.

    Raises:
        TrainError: there is no benchmark of that name.
    """
    if name is None or name in ("-h", "--help"):
        for text in listing():
            say(text)
        return 0
    if name in TOOLS:
        return _process(TOOLS[name].module, arguments)
    if name not in (*BENCHMARKS, "all"):
        raise TrainError(f"no benchmark {name!r}; there are: {', '.join((*BENCHMARKS, 'all', *TOOLS))}")
    chosen = BENCHMARKS if name == "all" else {name: BENCHMARKS[name]}
    if {"-h", "--help"} & set(arguments):
        return _process(BENCHMARKS[name].module, ["--help"]) if name != "all" else run(None, [], say)
    full, quick = "--full" in arguments or _value(arguments, "--preset") == "full", "--quick" in arguments
    if full and quick:
        raise TrainError("give --quick or --full, not both")
    own = [word for word in arguments if word not in ("--full", "--quick")]
    if not {"--json", "--results"} & _options(own):
        own += ["--results", str(DEFAULT)]
    _headline(own, say)
    status = 0
    for item in chosen.values():
        for given in dict.fromkeys(_without(given, own) for given in (item.full if full else item.quick)):
            try:
                status = _process(item.module, [*given, *own]) or status
            except KeyboardInterrupt:
                say("stopped")
                return 130
    return status


def _without(given: Arguments, own: list[str]) -> Arguments:
    """The table's arguments less the options that were typed: one run for all that then are equal."""
    kept, skip, typed = [], False, _options(own)
    if "--peers" in typed:
        typed.add("--no-compile")  # who names a compiled peer wants it
    for word in given:
        skip = word in typed if word.startswith("-") else skip
        if not skip:
            kept.append(word)
    return tuple(kept)


def _options(arguments: list[str]) -> set[str]:
    """The names of the options among arguments; argparse takes --name VALUE and --name=VALUE."""
    return {word.partition("=")[0] for word in arguments if word.startswith("-")}


def _value(arguments: list[str], option: str) -> str | None:
    """What an option was given, or None."""
    for word, after in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else after
    return None


def _headline(arguments: list[str], say: Callable[[str], None]) -> None:
    from maefast.bench import machine

    device = "cuda" if _value(arguments, "--device") == "cuda" else "cpu"
    try:
        say(machine.headline(device))
    except (AssertionError, RuntimeError) as error:  # no such device; the benchmark says so itself
        say(f"{device}: {error}")


def _process(module: str, arguments: list[str]) -> int:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler says on stderr that it was there
    return subprocess.run([sys.executable, "-m", f"maefast.bench.{module}", *arguments], env=env).returncode
