"""docs/kernels.md: what it shows, when it is written anew, and that no kernel is missing."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels import page
from tests.kernels.narrow import CAUSES
from tests.kernels.page import PAGE, Section, update
from tests.kernels.resources import Resources
from tests.kernels.support import INTERPRET
from tests.kernels.variants import Variant

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
WIDE = Resources(32, 0, 0, {4: 1, 16: 3}, {16: 1})
COMPILERS = "Triton 3.9.0, ptxas 13.1 for sm_80"


def launch(case: str = "f32", number: int = 0, registers: tuple[int, int, int] = (32, 32, 40), **change):
    made = Variant("norm", "some_kernel", case, number, 80, 4, found=WIDE._replace(**change))
    return [
        made._replace(target=target, found=made.found._replace(registers=count))
        for target, count in zip((80, 90, 100), registers)
    ]


def shown(name: str) -> dict[str, int]:
    """{kernel: launches} of a section of the page."""
    begin, end = Section(name, None, []).markers
    body = PAGE.read_text().partition(begin)[2].partition(end)[0]
    found = re.findall(r"^\| `(\w+)` \| (?:only|worst of (\d+)) \|", body, re.MULTILINE)
    return {kernel: int(count or 1) for kernel, count in found}


@pytest.mark.skipif(INTERPRET or importlib.util.find_spec("triton") is None, reason="compiled kernels only")
def test_every_compile_case_is_in_the_page():
    from tests.kernels.compile_all import record

    assert shown("triton") == Counter(made.kernel for made in record(False)), "run make kernels"


def test_every_cuda_kernel_is_in_the_page():
    text = "".join(path.read_text() for path in sorted(CUDA.glob("*.cu*")))
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\([^;{]*?\)\s+)?(\w+_kernel)\(", text))
    assert len(kernels) == text.count("__global__ void")
    assert set(shown("cuda")) == kernels, "run make kernels"


def test_what_is_narrow_is_explained():
    text = PAGE.read_text()
    assert page.UNKNOWN not in text
    tables = re.findall(r"^### Narrow accesses$(.*?)^<!--", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"^\| `(\w+)` \|", "".join(tables), re.MULTILINE))
    assert named == set(CAUSES), "explained, but not narrow"
    new = launch("odd", loads={4: 8})
    assert page.UNKNOWN in page.render(Section("triton", COMPILERS, new))
    assert "| `some_kernel` | 1 of 1 | 0 of 1 | loads 8 x 4 B; stores 1 x 16 B | odd |" in page.narrow(
        page.families(new)["norm"]
    )
    assert "Narrow" not in page.render(Section("triton", COMPILERS, launch()))


def test_rows():
    variants = [
        *launch("small", 0, (32, 32, 32)),
        *launch("large", 1, (128, 128, 128), stores={2: 1}),
        *launch("middle", 2, (33, 33, 33)),
    ]
    text = page.render(Section("triton", COMPILERS, variants))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    worst = "| `some_kernel` | worst of 3 | 4 | 128 | 0 | 0 | 25 | registers | 92 | 0 | large |"
    middle = "|  | typical | 4 | 33 | 0 | 0 | 75 | registers | 92 | 100 | middle |"
    assert lines[2:4] == [worst, middle]
    assert text.startswith(f"1 kernels, 9 compilations by {COMPILERS}.\n")
    only = page.render(Section("triton", COMPILERS, launch("small")))
    one = "| `some_kernel` | only | 4 | 32 / 32 / 40 | 0 | 0 | 100 / 100 / 75 | - / - / registers | 92 | 100 | small |"
    assert one in only
    assert page.render(Section("triton", COMPILERS, variants[::-1])) == text


@pytest.fixture
def written(tmp_path):
    """A page that shows `launch()`."""
    path = tmp_path / "kernels.md"
    triton, cuda = Section("triton", COMPILERS, launch()), Section("cuda", None, [])
    path.write_text("Above.\n" + "\n".join("\n".join(section.markers) for section in (triton, cuda)) + "\nBelow.\n")
    fresh, _ = update([triton], path, adopt=True)
    assert not fresh
    assert "| `some_kernel` | only |" in path.read_text()
    return path


def test_a_page_that_shows_it(written):
    text = written.read_text()
    assert text.startswith("Above.\n")
    assert text.endswith("\nBelow.\n")
    assert update([Section("triton", COMPILERS, launch())], written) == (True, [])
    assert written.read_text() == text


def test_a_page_that_shows_something_else(written):
    text, other = written.read_text(), [Section("triton", COMPILERS, launch(registers=(40, 32, 40)))]
    fresh, notes = update(other, written, write=False)
    assert not fresh
    assert "run make kernels" in notes[-1]
    assert any(note.startswith("+| `some_kernel` | only | 4 | 40 / 32 / 40 |") for note in notes)
    assert written.read_text() == text
    assert update(other, written)[0] is False
    assert "40 / 32 / 40" in written.read_text()
    assert update(other, written) == (True, [])


def test_other_compilers_are_not_compared(written):
    text, other = written.read_text(), [Section("triton", "Triton 3.5.0, ptxas 12.8", launch(registers=(99, 99, 99)))]
    fresh, notes = update(other, written)
    assert fresh
    assert "not compared" in notes[0]
    assert written.read_text() == text
    assert update(other, written, adopt=True)[0] is False
    assert "compilations by Triton 3.5.0, ptxas 12.8." in written.read_text()


def test_rows_are_kept_where_nothing_compiles_them(written):
    text = written.read_text()
    fresh, notes = update([Section("triton", COMPILERS, launch()), Section("cuda", None, [])], written)
    assert fresh
    assert "kept" in notes[0]
    assert written.read_text() == text


def test_a_page_without_markers(tmp_path):
    path = tmp_path / "kernels.md"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        update([Section("triton", COMPILERS, launch())], path)
