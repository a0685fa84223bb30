"""Every link of the documentation leads somewhere: files exist, headings exist, pages are reached. No network."""

from __future__ import annotations

import importlib.util
import re

import pytest

from .pages import PAGES, ROOT, anchors, prose, text_of

_LINK = re.compile(r"\]\(([^()\s]+)\)")
_spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/_site/hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def problem(page: str, target: str) -> str | None:
    """What is wrong with a link."""
    if re.match(r"https?://\S+\.\S+$", target):
        return None
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if not file.resolve().exists():
        return "there is no such file"
    if ROOT not in file.resolve().parents:
        return "leads out of the repository"
    if anchor and (file.suffix != ".md" or anchor not in anchors(str(file.resolve().relative_to(ROOT)))):
        return "there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    wrong = [(target, why) for target in _LINK.findall(prose(page)) if (why := problem(page, target))]
    assert not wrong


def test_a_broken_link_is_found():
    assert problem("README.md", "docs/nowhere.md") == "there is no such file"
    assert problem("docs/data.md", "#nowhere") == "there is no such heading"
    assert problem("README.md", "../elsewhere") is not None
    assert problem("docs/data.md", "images.md#speed") is None


def test_every_page_is_linked_and_in_the_navigation():
    reached = set()
    for page in PAGES:
        for target in _LINK.findall(prose(page)):
            if not re.match(r"[a-z]+:", target) and (path := target.partition("#")[0]):
                reached.add(str(((ROOT / page).parent / path).resolve()))
    lost = [page for page in PAGES if page != "README.md" and str(ROOT / page) not in reached]
    assert not lost, "no page links to these"

    nav = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(nav) == len(set(nav))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert set(nav) == pages | set(hooks.generated())


def test_pictures_have_words_and_no_picture_is_lost():
    shown = set()
    for page in PAGES:
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^()\s]+)\)", text_of(page)):
            assert words, f"{page}: {target} has no words"
            shown.add(((ROOT / page).parent / target).resolve())
    there = set((ROOT / "docs/images").glob("*.png"))
    assert there == {path for path in shown if path.parent == ROOT / "docs/images"}


def test_links_on_the_site():
    """The hook of mkdocs.yml: pages elsewhere in the repository have one of their own, source files have none."""
    assert hooks.site_target("../bench/README.md#files", "docs/results.md") == "benchmarks.md#files"
    assert hooks.site_target("docs/recipes/README.md", "README.md") == "recipes/README.md"
    assert hooks.site_target("../docs/evidence.md", "bench/README.md") == "evidence.md"
    assert hooks.site_target("../../README.md", "docs/recipes/cae.md") == "../index.md"
    assert hooks.site_target("../maefast/ops", "docs/data.md") is None
    text = "[`ops`](maefast/ops), `[not](a-link.md)` and ![a](docs/images/demo.png)\n```\n[nor](this.md)\n```\n"
    assert hooks.rewrite(text, "README.md") == text.replace("[`ops`](maefast/ops)", "`ops`").replace(
        "docs/images", "images"
    )
    there = hooks.rewrite("[demo](demo.py)", "examples/README.md", "https://example.org/maefast/")
    assert there == "[demo](https://example.org/maefast/blob/HEAD/examples/demo.py)"


def test_the_reference_shows_what_is_there():
    """Each name of the reference exists and has words of its own, and none of a package's `__all__` is left out."""
    import importlib

    for package in hooks.REFERENCE:
        for name in hooks.public_names(package):
            *modules, last = name.split(".")
            found = getattr(importlib.import_module(".".join([package, *modules])), last)
            assert not callable(found) or vars(found).get("__doc__") or getattr(found, "__doc__", None), name
    assert set(hooks.public_names("maefast.optim")) == {"AdamW", "shadow_of", "shadows_in_graph"}
