"""The pages of the documentation, and what the tests look at in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "bench/README.md", "examples/README.md")),
        *(ROOT / "docs").rglob("*.md"),
    )
)


class Block(NamedTuple):
    """Fenced code: its language, text, the line of its first line, and why it is not run (None: it is)."""

    language: str
    text: str
    line: int
    skip: str | None


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> Iterator[Block]:
    """Fenced code. `<!-- no test: why -->` on the line before keeps a block from being run."""
    skip, fence, found, first = None, None, [], 0
    for number, line in enumerate(text_of(page).split("\n"), 1):
        if fence is None and (match := re.match(r"(`{3,})(\w*)", line)):
            fence, language, found, first = match[1], match[2], [], number + 1
        elif fence is not None and line.rstrip() == fence:
            yield Block(language, "\n".join(found) + "\n", first, skip)
            fence = skip = None
        elif fence is not None:
            found.append(line)
        elif line.strip():
            match = re.fullmatch(r"<!-- no test: (.+) -->", line.strip())
            skip = match[1] if match else None
    assert fence is None, f"{page}: a fence is not closed"


def prose(page: str) -> str:
    """The page with its code, fenced, indented and in lines, blanked out."""
    text = re.sub(r"^(`{3,}).*?^\1$", lambda m: re.sub(r"[^\n]", " ", m[0]), text_of(page), flags=re.M | re.S)
    text = re.sub(r"(?<=\n\n)(    .*\n|\n)+", lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    return re.sub(r"`[^`\n]+`", lambda m: "x" * len(m[0]), text)


def anchors(page: str) -> set[str]:
    """The headings as GitHub (and the slugs of mkdocs.yml) name them."""
    found: set[str] = set()
    text = re.sub(r"^(`{3,}).*?^\1$", "", text_of(page), flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def shell_lines(page: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what stands in code that is no Python: fenced or indented, continued lines joined."""
    inside, joined, start = False, "", 0
    python = False
    for number, line in enumerate(text_of(page).split("\n"), 1):
        if match := re.match(r"`{3,}(\w*)", line):
            inside, python = not inside, match[1] == "python"
            continue
        if not (inside and not python) and not line.startswith("    "):
            joined = ""
            continue
        start = start if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        yield start, joined
        joined = ""


def inline_code(page: str) -> Iterator[str]:
    text = re.sub(r"^(`{3,}).*?^\1$", "", text_of(page), flags=re.M | re.S)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield " ".join(match[1].split())
