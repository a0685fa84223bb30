"""What README and docs/ say can be followed: links and anchors lead somewhere, Python parses and names what there is,
commands and their options exist."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from maefast.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# Before a block that cannot be taken as it stands, with the reason; no reader sees it.
SKIP = re.compile(r"<!-- no test: [^>]+ -->\s*\Z")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(params=PAGES, ids=name_of)
def page(request) -> Path:
    return request.param


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown make them of headings."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", page.read_text()), re.M):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\([^)]*\)", "", heading).lower())
        found.add(words.strip().replace(" ", "-"))
    return found


def test_links_lead_somewhere(page):
    wrong = []
    for target in LINK.findall(without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            wrong.append(f"{target}: no such heading")
    assert not wrong, f"{name_of(page)}: {'; '.join(wrong)}"


def blocks(page: Path, language: str) -> Iterator[str]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == language and not SKIP.search(text[: match.start()]):
            yield match[2]


def test_python_parses_and_names_what_there_is(page):
    for block in blocks(page, "python"):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            pytest.fail(f"{name_of(page)}: {error}\n{block}")
        for name in names_of_ours(tree):
            assert exists(name), f"{name_of(page)}: there is no {name}\n{block}"


def names_of_ours(tree: ast.AST) -> Iterator[str]:
    """maefast.a.b as attributes, and what is imported from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, at = [], node
            while isinstance(at, ast.Attribute):
                parts.append(at.attr)
                at = at.value
            if isinstance(at, ast.Name) and at.id == "maefast":
                yield ".".join(["maefast", *reversed(parts)])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maefast":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def exists(name: str) -> bool:
    """A module, or what is in one. What an object of ours has is not looked into."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return count == len(parts) or hasattr(found, parts[count])
    return False


def commands(page: Path) -> Iterator[list[str]]:
    """Lines of code blocks that start with `maefast`, and `maefast ...` in running text."""
    text = page.read_text()
    code = "".join(match[2] for match in FENCE.finditer(text) if match[1] in ("", "bash", "sh", "console"))
    code += "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    lines = re.findall(r"^(?:\$ )?(?:torchrun .*?-m )?maefast(?:\.cli)? [^\n]*", code.replace("\\\n", " "), re.M)
    lines += re.findall(r"`(maefast [^`]*)`", FENCE.sub("", text).replace("\n", " "))
    for line in lines:
        line = re.sub(r"\s#.*|…|\.\.\.", "", line)
        yield line[line.index("maefast") :].removeprefix("maefast.cli").removeprefix("maefast").split()


def test_commands_and_options_exist(page):
    root = typer.main.get_command(app)
    for words in commands(page):
        chosen = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)][:1]
        if not words or words[0] != (chosen or [None])[0]:
            continue  # "maefast --version", "maefast | ..."
        assert chosen[0] in root.commands, f"{name_of(page)}: maefast {' '.join(words)}"
        command = root.commands[chosen[0]]
        if chosen[0] == "bench":  # whose options are those of each benchmark
            continue
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {
            "-h",
            "--help",
        }
        for word in words[1:]:
            option = re.match(r"--?[a-z][a-z-]*", word.strip("[]()'\"|"))
            if option and not re.fullmatch(r"-?\d.*", word):
                for name in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", word):
                    assert name in known, f"{name_of(page)}: {name} in maefast {' '.join(words)}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "reference").glob("*.md")), ids=lambda path: path.stem)
def test_the_reference_has_every_public_name(path):
    """A function that is named as its module is not found through the package, and needs a line of its own."""
    entries = re.findall(r"^::: ([\w.]+)$", path.read_text(), re.M)
    assert entries
    for entry in entries:
        assert exists(entry) or exists(entry.rpartition(".")[0]), entry
    name = f"maefast.{path.stem}"
    if name in entries:
        package = importlib.import_module(name)
        files = {file.stem for file in Path(package.__file__).parent.glob("*.py")}
        hidden = [one for one in getattr(package, "__all__", ()) if one in files]
        assert {f"{name}.{one}.{one}" for one in hidden} <= set(entries), f"{path.name} lacks {', '.join(hidden)}"


def test_every_page_is_in_the_navigation():
    """mkdocs says so of pages alone that it builds; recipes are listed by the hook."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if f"- {page}\n" not in navigation and not page.startswith("recipes/")]


def test_the_checks_find_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.md"
    bad.write_text("# A `b` c!\n\n```python\nmaefast.ops.nothing(1)\nfrom maefast.masking import random\n```\n\n"
                   "    maefast pretrain --nothing 1\n\nand `maefast doctor --json`.\n")  # fmt: skip
    assert anchors(bad) == {"a-b-c"}
    names = set(names_of_ours(ast.parse(next(blocks(bad, "python")))))
    assert names == {"maefast.masking.random", "maefast.ops", "maefast.ops.nothing"}
    assert {name for name in names if not exists(name)} == {"maefast.ops.nothing"}
    assert list(commands(bad)) == [["pretrain", "--nothing", "1"], ["doctor", "--json"]]
