"""The page on the command line, made from the parsers themselves."""

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from avmae_fast.cli.program import make_parser

_INTRODUCTION = """\
# Command line

Made from the program's own parsers. Every command answers to `--help`, which loads no torch.
"""


def page() -> str:
    """The page in Markdown."""
    # Defaults that count the cores of the machine would be those of whoever built the page.
    with mock.patch.object(os, "sched_getaffinity", lambda _: range(8), create=True):
        parser = make_parser()
    parts = [_INTRODUCTION, f"{parser.epilog}\n"]
    for name, command, summary in commands(parser):
        parts += _section(f"avmae {name}", command, summary, level=2)
    return "\n".join(parts)


def commands(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Name, parser and summary of each command below `parser`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield name, command, summaries.get(name, "")


def _section(
    title: str, parser: argparse.ArgumentParser, summary: str, level: int
) -> Iterator[str]:
    yield f"{'#' * level} {title}\n"
    text = parser.description or f"{summary[:1].upper()}{summary[1:]}."
    yield f"{text}\n" if text != "." else ""
    rows = [row for action in parser._actions if (row := _row(action)) is not None]
    if rows:
        yield "| argument | meaning |\n|---|---|"
        yield "\n".join(rows) + "\n"
    for name, command, of_command in commands(parser):
        yield from _section(f"{title} {name}", command, of_command, level + 1)
    # That of the whole program is told once.
    if parser.epilog and not parser.epilog.startswith("Exit codes"):
        yield f"{parser.epilog}\n"


def _row(action: argparse.Action) -> str | None:
    if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
        return None
    words = ", ".join(f"`{option}{_value(action)}`" for option in action.option_strings)
    words = words or f"`{_metavar(action)}`"
    choices = list(action.choices or ())
    listed = f"one of {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""
    meaning = "; ".join(part for part in (action.help, listed) if part)
    return f"| {words} | {_cell(meaning)} |"


def _value(action: argparse.Action) -> str:
    return "" if action.nargs == 0 else f" {_metavar(action)}"


def _metavar(action: argparse.Action) -> str:
    name = action.metavar or action.dest.upper()
    shown = " ".join(name) if isinstance(name, tuple) else name
    return f"{shown} ..." if action.nargs == "+" else shown


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%")
