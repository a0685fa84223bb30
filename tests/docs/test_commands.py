"""Every command that the documentation shows would be understood: commands, options and values, by typer's own parser
and `PretrainConfig.check`; nothing runs."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
import typer

from maefast.cli import _configured, _was_given, app
from maefast.errors import ConfigError

from .pages import PAGES, ROOT, inline_code, shell_lines

ROOT_COMMAND = typer.main.get_command(app)
# Options of other programs that pages name.
FOREIGN = {"--family", "--max-restarts", "--signals-to-handle", "--standalone"}
# Pages about the benchmarks' own options.
OTHERS = {"bench/README.md", "docs/gpu.md", "docs/results.md", "docs/kernels.md", "docs/releasing.md", "CHANGELOG.md"}
PLACEHOLDER = re.compile(r"(?<![\w./-])[A-Z][A-Z]*(?![\w./-])")


def commands(line: str) -> list[str]:
    """The arguments of `maefast` in a line of a shell, or [] where it is another command."""
    line = line.split(" #")[0].strip().removeprefix("$ ").removesuffix("&").strip()
    line = re.sub(r"\b([\w.]+)(?:\|[\w.]+)+", r"\1", re.sub(r"[\[\]]", "", line))  # a|b, [--maybe]
    match = re.match(
        r"(?:[A-Z_]+=\S+ )*(?:(?:torchrun|accelerate launch|srun)\b.*)?(?:-m maefast\.cli|maefast) (?=[a-z-])", line
    )
    return shlex.split(line[match.end() :]) if match else []


def complaint(arguments: list[str], whole: bool) -> str | None:
    """What `maefast` would say of its arguments. Unless `whole`, what is missing does not count."""
    name, *rest = arguments
    command = ROOT_COMMAND.commands.get(name)
    if command is None:
        return f"no command {name!r}"
    if name == "bench":
        from maefast.bench import menu

        known = {*menu.BENCHMARKS, *menu.TOOLS, "all"}
        return None if not rest or rest[0] in known or PLACEHOLDER.fullmatch(rest[0]) else f"no benchmark {rest[0]!r}"
    whole = whole and not {"...", "…"} & set(rest)
    left_out = ("...", "…")  # the value of an option, or more arguments
    rest = [PLACEHOLDER.sub("1", part) for before, part in zip(["", *rest], rest)
            if part not in left_out or before.startswith("--")]  # fmt: skip
    try:
        context = command.make_context(name, rest)
    except Exception as error:  # click's, or those of the copy that typer brings
        kind, text = type(error).__name__, getattr(error, "message", None) or str(error)
        missing = kind == "MissingParameter" or "requires an argument" in text
        return None if missing and not whole else f"{kind}: {text}"
    if name != "pretrain" or not whole:
        return None
    try:
        _configured({key: value for key, value in context.params.items() if _was_given(context, key)}).check()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for number, line in shell_lines(page):
        if (arguments := commands(line)) and (why := complaint(arguments, whole=True)):
            wrong.append(f"line {number}: {line}: {why}")
    for code in inline_code(page):
        if (arguments := commands(code)) and (why := complaint(arguments, whole=False)):
            wrong.append(f"`{code}`: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS])
def test_options_exist(page):
    """`--option` in the middle of a sentence."""
    known = {flag for command in ROOT_COMMAND.commands.values() for entry in command.params for flag in
             (*entry.opts, *entry.secondary_opts)}  # fmt: skip
    used = {flag for code in inline_code(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)
            if code.startswith(("--", "maefast"))}  # fmt: skip
    assert not used - known - FOREIGN


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for code in (*inline_code(page), *(line for _, line in shell_lines(page))):
        if match := re.match(r"(?:\$ )?python -m ((?:bench|tests|maefast)[\w.]*)", code):
            assert importlib.util.find_spec(match[1]), code
        if match := re.match(r"(?:\$ )?make ([a-z]+)", code):
            assert match[1] in targets, code


def test_what_is_wrong_is_found():
    assert commands("torchrun --nproc-per-node 8 -m maefast.cli pretrain --data a/  # eight") == [
        "pretrain",
        "--data",
        "a/",
    ]
    assert commands("pip install maefast") == []
    for line in ("pretrain --data a/ --mask 0.5", "pretrain --data a/ --amp bf61", "pretrain --amp bf16",
                 "pretrain --data a/ --mean 1", "probe out/", "pretrian --data a/"):  # fmt: skip
        assert complaint(line.split(), whole=True), line
    assert complaint(["reconstruct", "RUN", "--count", "N"], whole=False) is None
