"""What the pages tell users to run, runs: Python as it is, shell lines as far as the parser."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import cli_reference
import pytest
import torch
from libraries import library
from pages import PAGES, TEXTS, fenced, without_fences

from avmae_fast.cli.program import make_parser
from avmae_fast.config_file import load_config

# A line that runs the program, by its name or as a module, and what ends a command.
_COMMAND = re.compile(r"(?:^|[\s])avmae(?:_fast\.cli)? (?P<arguments>.+)")
_ENDS = ("#", "&", "|", ";", "&&")
_TORCHRUN = {"--signals-to-handle"}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(fenced(page.read_text(), "python"))],
    ids=lambda p: p.stem,
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"^import (timm|transformers)$", page.read_text(), re.MULTILINE):
        library(name)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    for block in fenced(page.read_text(), "python"):
        exec(compile(block, page.name, "exec"), names)


def test_python_goes_by_one_name() -> None:
    for page in PAGES:
        for block in fenced(page.read_text(), "py", "pycon", "python3"):
            pytest.fail(f"{page.name} has a block that the test above does not see:\n{block}")


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `avmae ...` in the blocks that are typed into a shell."""
    for block in fenced(text, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found = _COMMAND.search(line)
            if found and not line.lstrip().startswith(("#SBATCH", "from ", "import ")):
                words = shlex.split(found["arguments"], comments=True)
                end = next((i for i, word in enumerate(words) if word in _ENDS), len(words))
                yield words[:end]


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(p.parents[1])))
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(page.read_text()):
        try:
            args = make_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: avmae {shlex.join(arguments)}: {capsys.readouterr().err}")
        if arguments[0] == "pretrain":
            # Fields that do not exist, and values that they cannot have, are refused here.
            load_config(args.config, args.overrides)
        elif arguments[0] == "bench-data":
            load_config(args.config, [*args.overrides, f"data.manifest={args.manifest}"])


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(p.parents[1])))
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    parsers = dict(_parsers("avmae", make_parser()))
    options = {word for parser in parsers.values() for word in parser._option_string_actions}
    prose = without_fences(page.read_text())
    for word in re.findall(r"`avmae ([\w-]+)", prose):
        assert f"avmae {word}" in parsers, f"{page.name}: there is no avmae {word}"
    for word in re.findall(r"`(--[\w-]+)", prose):
        assert word in options | _TORCHRUN, f"{page.name}: no command has {word}"


def test_the_commands_are_found() -> None:
    """The two tests above would pass on pages of which they see nothing."""
    found = [arguments[0] for page in TEXTS for arguments in commands(page.read_text())]
    assert {"pretrain", "pack", "manifest", "convert", "doctor"} <= set(found)
    assert len(found) > 20
    several_lines = "torchrun --x \\\n  -m avmae_fast.cli pretrain demo --resume &\n"
    assert list(commands(f"```\n{several_lines}```\n")) == [["pretrain", "demo", "--resume"]]


def _parsers(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for word, command, _ in cli_reference.commands(parser):
        yield from _parsers(f"{name} {word}", command)
