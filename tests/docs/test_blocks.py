"""Every ```python block of the documentation runs, in the order of its page and in one namespace, on toys.

A page that takes names for granted (`model`, `images`) has them from stand_ins.py. A block that cannot run here says
why in a comment that readers do not see, `<!-- no test: why -->`, on the line before; it must compile all the same.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from .pages import PAGES, ROOT, blocks
from .stand_ins import NAMES, small

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_run(page, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with small(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, object] = {}
        for number, block in enumerate(block for block in blocks(page) if block.language == "python"):
            for stand_ins in NAMES.get(page, ())[number : number + 1]:
                names.update(stand_ins())
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
            if block.skip is None:
                exec(code, names)


def test_reasons_are_few_and_said():
    """A block is left out for a reason that no toy mends."""
    skipped = [(page, block.line, block.skip) for page in PAGES for block in blocks(page) if block.skip is not None]
    assert all(len(why) > 10 for _, _, why in skipped)
    assert len(skipped) <= 6, skipped
