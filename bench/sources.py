"""What code a module runs: its own file and all that it reaches by imports, with the kernels beside the ops.

Read from syntax, so that it works of any commit without running it, and by whole files: rather too much than too little
(one constant of a file brings all that this file imports). A package's `__init__` only hands on names, so a
name is followed to the module that defines it; where the `__init__` defines it itself, that file counts. The file of an
op's family brings the kernels of its name (docs/architecture.md): csrc/cpu for a CPU, csrc/cuda and kernels/ for a GPU,
with what they include. Of a benchmark's file nothing but bench/peers is followed: what it measures is named by
`freshness`. Formatting, comments and docstrings change no digest, and no digest depends on the version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import posixpath
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TOPS = ("maefast", "kernels", "bench", "csrc")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".cmake", ".json")
# Where modules are when installed, and where their files are.
ELSEWHERE = {"maefast/bench": "bench", "maefast/kernels": "kernels"}
# Declarations of every op: a new one moves no other.
LISTS = ("csrc/cpu/ops.h", "csrc/cuda/ops.h")
# A plan of cells is made beside those of tokens: what computes on cells reaches their ops by another way.
LEFT_OUT = {("maefast/masking/uniform.py", "maefast/ops/cells.py")}
_COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""", re.DOTALL)

Tree = dict[str, str]  # path -> text of every source


def checkout(root: Path) -> Tree:
    """The files as they are now. A tree in which bench/ and kernels/ stand inside of maefast/ reads the same."""
    found = {}
    for top in TOPS:
        for path in (root / top).rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.suffix in SUFFIXES and not name.startswith("bench/results/") and path.is_file():
                found[_place(name)] = path.read_text()
    return found


def committed(root: Path, commit: str) -> Tree | None:
    """The files of a commit; None where git does not know it."""
    command = ("git", "archive", "--format=tar", commit, "--", *TOPS, ":!bench/results")
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as tar:
        members = [member for member in tar if member.isfile() and member.name.endswith(SUFFIXES)]
        return {member.name: tar.extractfile(member).read().decode() for member in members}


def digest(
    tree: Tree, follow: Iterable[str], alone: Iterable[str] = (), device: str = "cpu", without: tuple[str, ...] = ()
) -> str | None:
    """A short digest of files and all that they reach; None where one of those named is missing.

    follow: paths whose imports are followed. alone: paths that count as they are. device: "cpu" or "cuda", whose
    kernels count. without: starts of paths that do not count where they are reached.
    """
    follow, alone = list(follow), list(alone)
    if any(path not in tree for path in (*follow, *alone)):
        return None
    total = hashlib.sha256()
    for path in sorted(reached(tree, follow, device, without) | set(alone)):
        total.update(f"{path} {canonical(path.rpartition('.')[2], tree[path])}\n".encode())
    return total.hexdigest()[:12]


def reached(tree: Tree, follow: Iterable[str], device: str, without: tuple[str, ...] = ()) -> set[str]:
    """All files that these run, themselves among them."""
    found: set[str] = set()
    todo = [*follow, *(path for path in (f"csrc/build/{'cpu' if device == 'cpu' else 'cuda'}.cmake",) if path in tree)]
    while todo:
        path = todo.pop()
        if path in found or path.startswith(without):
            continue
        found.add(path)
        if path.endswith(".py"):
            todo += [other for other in _imported(tree, path) if _followed(path, other)]
            todo += _kernels(tree, path, device)
        elif path.startswith("csrc/"):
            todo += _included(tree, path)
    return found


# ---- texts


@functools.cache
def canonical(suffix: str, text: str) -> str:
    """A digest of a source that its layout and comments do not change."""
    if suffix == "py":
        text = "".join(_words(_module(text).tree))
    elif suffix == "cmake":
        text = re.sub(r"#[^\n]*|\s+", "", text)
    elif suffix != "json":
        text = re.sub(r"\\\n|\s+", "", _COMMENT.sub(lambda match: match[1] or "", text))
    return hashlib.sha256(text.encode()).hexdigest()


def _words(node: Any) -> Iterator[str]:
    """A syntax tree as text, the same in every Python: its kinds of nodes and what stands in them, nothing empty."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and _has_docstring(node):
                value = value[1:]
            elif name == "values" and isinstance(node, ast.JoinedStr):
                value = _merged(value)
            if name not in ("ctx", "kind", "type_comment") and value is not None and value != []:
                yield f" {name}"
                yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        for each in node:
            yield from _words(each)
    else:
        yield f"={node!r}"


def _merged(parts: list[ast.expr]) -> list[Any]:
    """The parts of an f-string, whose literal ones Python 3.12 splits otherwise than others."""
    found: list[Any] = []
    for part in parts:
        if not isinstance(part, ast.Constant):
            found.append(part)
        elif found and isinstance(found[-1], str):
            found[-1] += part.value
        elif part.value:
            found.append(part.value)
    return found


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


class _Module(NamedTuple):
    tree: ast.Module
    names: dict[str, tuple[int, str, str]]  # local name -> (level, module, name in it) of `from module import name`
    modules: list[str]  # of `import a.b.c`
    chains: set[tuple[str, ...]]  # ("ops", "linear") of `ops.linear`


@functools.cache
def _module(text: str) -> _Module:
    tree = ast.parse(text)
    names, modules, chains = {}, [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = node.level, node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                modules.append(alias.name)
                if alias.asname:
                    package, _, name = alias.name.rpartition(".")
                    names[alias.asname] = 0, package, name
        elif isinstance(node, ast.Attribute) and (chain := _chain(node)):
            chains.add(chain)
    return _Module(tree, names, modules, chains)


def _chain(node: ast.Attribute) -> tuple[str, ...]:
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return (inner.id, *reversed(parts)) if isinstance(inner, ast.Name) else ()


# ---- what leads where


def _place(name: str) -> str:
    for installed, place in ELSEWHERE.items():
        if name == installed or name.startswith(installed + "/"):
            return place + name[len(installed) :]
    return name


def _followed(path: str, other: str) -> bool:
    return (path, other) not in LEFT_OUT and (not path.startswith("bench/") or other.startswith("bench/peers/"))


def _imported(tree: Tree, path: str) -> Iterator[str]:
    """The files that a Python file imports names from."""
    module = _module(tree[path])
    for local, (level, package, name) in module.names.items():
        base = _base(path, level, package)
        if base is None:
            continue
        chains = [chain[1:] for chain in module.chains if chain[0] == local]
        for chain in chains or [()]:
            yield from _resolved(tree, base, (name, *chain))
    for package in module.modules:
        if package.split(".")[0] == "maefast":
            yield from _resolved(tree, "maefast", tuple(package.split(".")[1:]))
    if "maefast" in module.modules:
        for chain in module.chains:
            if chain[0] == "maefast":
                yield from _resolved(tree, "maefast", chain[1:])


def _base(path: str, level: int, package: str) -> str | None:
    """The folder, or file without its ending, that `from package import` reads; None: not ours."""
    if not level:
        return _place(package.replace(".", "/")) if package.split(".")[0] == "maefast" else None
    folder = path
    for _ in range(level):
        folder = posixpath.dirname(folder)
    return posixpath.join(folder, package.replace(".", "/")) if package else folder


def _resolved(tree: Tree, base: str, names: tuple[str, ...], seen: frozenset = frozenset()) -> Iterator[str]:
    """The file that defines a name, asked for as base.name.more."""
    if f"{base}.py" in tree:
        yield f"{base}.py"
        return
    if not names or (base, names) in seen:
        return
    init, inside = f"{base}/__init__.py", _place(f"{base}/{names[0]}")
    if f"{inside}.py" in tree or any(path.startswith(f"{inside}/") for path in tree):  # a file, or a package
        yield from _resolved(tree, inside, names[1:], seen)
        return
    if init not in tree:
        return
    level, package, name = _module(tree[init]).names.get(names[0], (0, "", ""))
    other = _base(init, level, package) if name else None
    if other is None:
        yield init  # defined there
    else:
        yield from _resolved(tree, other, (name, *names[1:]), seen | {(base, names)})


def _kernels(tree: Tree, path: str, device: str) -> list[str]:
    """The kernels of an op's family."""
    folder, _, family = path.removesuffix(".py").rpartition("/")
    if folder != "maefast/ops" or family.startswith("_"):
        return ["maefast/ops/dispatch_data.json"] * (path == "maefast/ops/_dispatch_data.py" and device == "cuda")
    folders = ("csrc/cpu/",) if device == "cpu" else ("csrc/cuda/", "kernels/")
    starts = tuple(folder + family + ending for folder in folders for ending in (".", "_"))
    return [name for name in tree if name.startswith(starts)]


def _included(tree: Tree, path: str) -> Iterator[str]:
    """Headers of ours, and what is written of them in a file of the same name."""
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', tree[path], re.MULTILINE):
        for header in (f"csrc/{name}", posixpath.join(posixpath.dirname(path), name)):
            if header in tree and header not in LISTS:
                stem = header.rpartition(".")[0]
                yield from (file for file in (header, f"{stem}.cpp", f"{stem}.cu") if file in tree)
