"""Whether a figure is of the code as it is now: results carry digests of the sources that they depend on.

`results.document` writes them into the environment, {"code": {target: digest}}, from the checkout that was measured;
an installed wheel has no sources, and so no digests. A record is current if the digest of its target is what the
checkout gives now. A result from before there were digests is current if its commit, which had no changes, is known to
git and gives the same; without the history it is not.

What a target depends on is what its code reaches (`sources`), from

    ops/FAMILY          the op's file, with the kernels of the device
    step/KIND           the model (vit, spark, fcmae) and `maefast.graphs`; scaling: that of the ViT
    dropin/FAMILY       the file of maefast/integrations, and that of transformer blocks
    recipes/NAME        the recipe's file
    block, volumes      `maefast.nn`'s block; `sparsify` and the cells
    toys                the integrations of the models in it
    data                the photographs' loader

and from the benchmark itself: the file that says what is timed, and the peers that it is held against. Not from the
clocks, tables and options around it (bench/step.py, dropin.py, recipes.py, scaling.py, micro/suite.py, timing.py), nor,
except for `data`, from what reads files (maefast/data, maefast/train), which stands outside of a step. Whether the
compiled library is that of the sources is not looked at: build before measuring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from maefast.bench import sources
from maefast.bench.environment import CHECKOUT

OUTSIDE = ("maefast/data/", "maefast/train/")
_STEP = ("maefast/graphs/step.py", "bench/peers/models.py", "bench/peers/worker.py")


class Roots(NamedTuple):
    """Where a target's code starts, as `sources.digest` takes it."""

    follow: tuple[str, ...]
    alone: tuple[str, ...] = ()
    without: tuple[str, ...] = OUTSIDE


def _integrations(*names: str) -> tuple[str, ...]:
    return tuple(f"maefast/integrations/{name}.py" for name in names)


_ACCELERATE = ("maefast/integrations/__init__.py",)  # by itself: it names the files of all families
_ROOTS = {
    **{f"step/{file}": Roots((f"maefast/models/{name}.py", *_STEP))
       for file, name in (("vit", "mae"), ("spark", "spark"), ("fcmae", "fcmae"))},
    "scaling": Roots(("maefast/models/mae.py", "bench/peers/plain_mae.py")),
    "block": Roots(("maefast/nn/block.py", "bench/block.py")),
    "volumes": Roots(("maefast/nn/sparsify.py", "maefast/nn/cells.py", "bench/volumes.py")),
    "toys": Roots((*_integrations("hf_vitmae", "mae", "transformer"), "bench/toys.py"), _ACCELERATE),
    "data": Roots(("maefast/data/images/samples.py", "maefast/train/data.py", "bench/data.py"), (), ()),
}  # fmt: skip
_PLACED = ("hf_beit", "hf_dinov3", "hf_vjepa2", "hf_swin")  # whose blocks alone are replaced
_FILES = {  # the others have the name of their family
    "dropin/timm": "timm_vit",
    "dropin/audiomae": "mae",
    **{f"dropin/{name}": "transformer" for name in _PLACED},
}


def roots(target: str) -> Roots:
    kind, _, name = target.partition("/")
    if target in _ROOTS:
        return _ROOTS[target]
    if kind == "ops":
        more = ("maefast/optim.py",) if name == "adamw" else ()
        more += ("bench/micro/attention_peers.py",) if name == "attention" else ()
        return Roots((f"maefast/ops/{name}.py", f"bench/micro/bench_{name}.py", *more))
    if kind == "recipes":
        return Roots((f"maefast/recipes/{name}.py", f"bench/peers/recipes/{name}.py"))
    if kind != "dropin":
        raise ValueError(f"unknown target {target!r}")
    kind = "convnets" if name in ("spark", "fcmae") else "hf" if name.startswith("hf_") else "vits"
    code = _integrations(_FILES.get(target, name), *(() if kind == "convnets" else ("transformer",)))
    peers = f"bench/peers/dropin_{kind}.py"
    return Roots((*code, peers, "bench/peers/worker.py"), (*_ACCELERATE, "bench/peers/dropin_models.py"))


def target(kind: str, record: dict[str, Any]) -> str:
    """What a record depends on; "ops/" for an op that no family of the suite has."""
    if kind == "micro":
        return f"ops/{_families().get(record['op'], '')}"
    if kind == "step":
        return "step/" + next((name for name in ("spark", "fcmae") if record["preset"].startswith(name)), "vit")
    if kind in ("dropin", "recipes"):
        return f"{kind}/{record['family' if kind == 'dropin' else 'recipe']}"
    return kind


def digests(targets: Iterable[str], device: str) -> dict[str, str]:
    """target -> digest of the checkout as it is, of those that it has the sources of. {} of an installed wheel."""
    found = {name: _digest(None, name, device) for name in sorted(set(targets))}
    return {name: value for name, value in found.items() if value is not None}


def all_targets() -> list[str]:
    """Every target of this checkout, for measurements whose results are put together later."""
    tree = _tree(None) or {}
    names = {"ops": "bench/micro/bench_", "recipes": "bench/peers/recipes/", "dropin": "maefast/integrations/"}
    found = [*_ROOTS, *_FILES]
    for kind, start in names.items():
        for path in tree:
            name = path.removeprefix(start).removesuffix(".py")
            if path.startswith(start) and "/" not in name and not name.startswith("_"):
                found.append(f"{kind}/{name}")
    return sorted(found)


def current(doc: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the code that a record of a result depends on is still that of this checkout."""
    environment, name = doc["environment"], target(doc["kind"], record)
    now = _digest(None, name, environment["kind"])
    if now is None:
        return False
    if "code" in environment:
        return environment["code"].get(name) == now
    if environment["dirty"] is not False or not environment["commit"]:
        return False
    return _digest(environment["commit"], name, environment["kind"]) == now


def split(docs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(results of the code as it is now, those of earlier code): documents with the records that are so."""
    return part(docs, current)


def part(
    docs: list[dict[str, Any]], wanted: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(documents with the records that are `wanted(doc, record)`, documents with the others); none without records."""
    found: tuple[list, list] = ([], [])
    for doc in docs:
        for into, want in zip(found, (True, False)):
            if records := [record for record in doc["records"] if wanted(doc, record) == want]:
                into.append({**doc, "records": records})
    return found


@functools.cache
def _families() -> dict[str, str]:
    """The family of each op of the suite, by name."""
    from maefast.bench.micro import suite

    return {op.name: family for family in suite.FAMILIES for op in suite.ops(family)}


@functools.cache
def _digest(commit: str | None, name: str, device: str) -> str | None:
    tree = _tree(commit)
    if not tree:
        return None
    where = roots(name)
    return sources.digest(tree, where.follow, where.alone, device, where.without)


@functools.cache
def _tree(commit: str | None) -> sources.Tree | None:
    """The sources of a commit, or of the checkout; None without."""
    if CHECKOUT is None:
        return None
    return sources.checkout(CHECKOUT) if commit is None else sources.committed(CHECKOUT, commit)


_tree(None)  # of the code that runs, whatever happens to the files meanwhile
