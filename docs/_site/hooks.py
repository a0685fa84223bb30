"""What mkdocs needs to know beyond docs/: pages that stand elsewhere in the repository, the reference, links.

Pages are written for a reader of the repository, whose links lead to files. On the site a link to a page leads to that
page, and one to any other file to the repository, if `repo_url` in mkdocs.yml names one; else only its text remains.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Pages of the repository outside of docs/, and the page of the site that each becomes.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "bench/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}

# The reference: a page for each package, with its public names (`__all__`), or those that are listed.
REFERENCE: dict[str, tuple[str, ...]] = {
    "maefast": ("accelerate", "report", "restore", "sparsify", "Cells", "graphed_step", "GraphCaptureError", "backend"),
    "maefast.ops": (),
    "maefast.masking": (),
    "maefast.nn": (),
    "maefast.models": (),
    "maefast.recipe": ("Recipe", "Spec", "Batch", "View", "Output", "Progress", "Picture"),
    "maefast.recipes": (),
    "maefast.data": (
        "images.Images", "images.batch.ImageBatch", "clips.Clips", "clips.ClipBatch", "points.Points",
        "points.PointBatch", "volumes.Volumes", "volumes.VolumeBatch", "channels.Channels", "channels.ChannelBatch",
        "spectrograms.Spectrograms", "spectrograms.SpectrogramBatch", "embeddings.Embeddings",
        "embeddings.EmbeddingBatch", "graphs.Graphs", "graphs.GraphBatch", "source.Source", "collection.Collection",
    ),
    "maefast.optim": (),
    "maefast.graphs": (),
    "maefast.integrations": ("accelerate", "report", "restore", "Report", "Note", "videomae.loss", "jepa.apply_masks"),
    "maefast.probe": ("features.extract", "features.Features", "knn.knn", "linear.linear_probe",
                      "attentive.attentive_probe", "accuracy.Accuracy"),
    "maefast.profiling": (),
    "maefast.train": ("pretrain", "PretrainConfig", "loop.Result", "probe.probe", "probe.Options", "finetune.finetune",
                      "finetune.Options", "data_speed.data_speed", "ConfigError", "CheckpointError", "BadImage",
                      "NonFiniteLoss", "TrainError"),
}  # fmt: skip
COMMANDS = "reference/commands.md"

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)[^`].*?\1")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_IMAGE = re.compile(r"!\[([^\[\]]*)\]\(([^()\s]+)\)")


def generated() -> list[str]:
    """Pages of the site that are no files of docs/, as `nav` names them."""
    return [*ELSEWHERE.values(), *(f"reference/{name}.md" for name in REFERENCE), COMMANDS]


def public_names(package: str) -> tuple[str, ...]:
    """What a page of the reference shows."""
    if REFERENCE[package]:
        return REFERENCE[package]
    path = ROOT / package.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return tuple(name for name in ast.literal_eval(node.value) if not name.startswith("_"))
    raise ValueError(f"{package} has no __all__")


def reference_page(package: str) -> str:
    quiet = "".join(f"      {option}: false\n" for option in ("members", "show_root_heading", "show_root_toc_entry"))
    head = f"# {package}\n\n::: {package}\n    options:\n{quiet}"
    return head + "".join(f"\n::: {package}.{name}\n" for name in public_names(package))


def commands_page() -> str:
    """`--help` of all commands, by typer itself."""
    import click
    import typer
    from typer.cli import get_docs_for_click

    from maefast.cli import app

    command = typer.main.get_command(app)
    context: Any = getattr(command, "context_class", click.Context)(command, info_name="maefast")
    page = get_docs_for_click(obj=command, ctx=context, name="maefast", title="Commands")
    return page.replace("# Commands", "# Commands\n\nWhat `maefast COMMAND --help` says.", 1)


def site_target(target: str, page: str) -> str | None:
    """Where a link of `page` (a path in the repository) leads on the site, relative to the page there; None: to no page
    of it. `target` is a path relative to `page`, with or without an #anchor."""
    path, hash_, anchor = target.partition("#")
    if not path:
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    to = ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if to is None or not (path in ELSEWHERE or (ROOT / path).is_file()):
        return None
    here = ELSEWHERE.get(page) or page.removeprefix("docs/")
    return posixpath.relpath(to, posixpath.dirname(here) or ".") + hash_ + anchor


def rewrite(text: str, page: str, repository: str | None = None) -> str:
    """The Markdown of `page` with links as the site has them."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        if (to := site_target(target, page)) is not None:
            return f"[{words}]({to})"
        if repository:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            return f"[{words}]({repository.rstrip('/')}/blob/HEAD/{path})"
        return words

    def image(match: re.Match[str]) -> str:
        words, target = match.groups()
        return f"![{words}]({site_target(target, page) or target})"

    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:  # code is no text, but may stand in the words of a link
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = _CODE.sub(keep, _FENCE.sub(keep, text))
    text = _LINK.sub(link, _IMAGE.sub(image, text))
    for _ in range(2):
        text = re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], text)
    return text


# ---- what mkdocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {to: (ROOT / path).read_text() for path, to in ELSEWHERE.items()}
    pages.update({f"reference/{name}.md": reference_page(name) for name in REFERENCE})
    pages[COMMANDS] = commands_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    name = page.file.src_uri
    origin = next((path for path, to in ELSEWHERE.items() if to == name), f"docs/{name}")
    # GitHub starts a list without an empty line before it, Python-Markdown does not.
    return _lists(rewrite(markdown, origin, config.get("repo_url")))


def _lists(text: str) -> str:
    lines, inside = [], False
    for line in text.split("\n"):
        if line.startswith("```"):
            inside = not inside
        before = lines[-1] if lines else ""
        starts = re.match(r"(- |\d+\. )", line) and before and not re.match(r"\s|- |\d+\. |#|\|", before)
        if starts and not inside and not _continues(lines):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _continues(lines: list[str]) -> bool:
    """Whether the paragraph before is an item of a list already."""
    for line in reversed(lines):
        if not line:
            return False
        if re.match(r"(- |\d+\. )", line):
            return True
    return False
