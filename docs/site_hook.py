"""What the site does with pages that are also read in the repository: the first page is the README, links to files that
are not of the site become plain names, and the commands' help is written out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_config(config):
    """Recipes in the order of their names."""
    pages = sorted(path.name for path in (ROOT / "docs" / "recipes").glob("*.md") if path.name != "README.md")
    for group in config["nav"]:
        if "Recipes" in group:
            group["Recipes"] = ["recipes/README.md", *(f"recipes/{name}" for name in pages)]
    return config


def on_files(files, config):
    readme = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/", "](", readme)
    files.append(File.generated(config, "index.md", content=text))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = os.path.dirname(page.file.src_uri)

    def link(match):
        text, target = match.groups()
        path = target.partition("#")[0]
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        inside = os.path.normpath(os.path.join(folder, path))
        return match[0] if files.get_file_from_path(inside) else f"{text} (`{inside.removeprefix('../')}`)"

    return LINK.sub(link, markdown)


def commands() -> str:
    """Every command's options, from the command line's own description."""
    import typer.main

    from maefast.cli import app

    parts = ["# Commands\n"]
    for name, command in typer.main.get_command(app).commands.items():
        parts.append(f"## maefast {name}\n\n{(command.help or '').strip()}\n")
        rows = []
        for param in command.params:
            words = getattr(param, "help", None) or ""
            default = getattr(param, "show_default", None)
            value = default if isinstance(default, str) else param.default
            value = getattr(value, "value", value)
            shown = "" if value in (None, False, "", [], ()) or callable(value) else f"`{value}`"
            names = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts) if opt.startswith("-"))
            rows.append(f"| {names or f'`{param.name.upper()}`'} | {words.replace('|', '&#124;')} | {shown} |")
        if rows:
            parts.append("| | | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)
