"""The site builds without a warning, and what pages quote is there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import cli_reference
import diagrams
import pytest
from pages import PAGES, ROOT, TEXTS, without_fences

from avmae_fast import config, finetune_config
from avmae_fast.cli.program import make_parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: links, anchors and names of functions that do not exist fail."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs `pip install -e '.[docs]'`")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return out


def test_builds_strictly(site: Path) -> None:
    for page in (*(page.stem for page in PAGES), "cli", "benchmarks", "examples"):
        assert (site / f"{page}.html").is_file(), page
    api = (site / "api.html").read_text()
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in api, name


def test_pages_fetch_nothing(site: Path) -> None:
    """Opened from a disk, without a network, a page is whole."""
    for page in site.glob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not fetched, f"{page.name} fetches {fetched}"


def test_relative_links_exist() -> None:
    """Of the files outside docs/, which the site's own check sees in part."""
    for text in (*TEXTS, ROOT / "examples/README.md", ROOT / "benchmarks/NOTES.md"):
        made = {"cli.md", "benchmarks.md", "benchmark_notes.md", "examples.md"}
        made |= {"contributing.md", "changelog.md"}
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", without_fences(text.read_text())):
            there = (text.parent / target).exists()
            assert there or (text in PAGES and target in made), f"{text.name} links to {target}"


def test_every_command_and_option_is_listed() -> None:
    page = cli_reference.page()
    for name, parser, _ in cli_reference.commands(make_parser()):
        assert f"## avmae {name}\n" in page
        for action in parser._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert f"`{option}" in page, f"avmae {name} {option}"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_pictures_are_what_the_code_draws(name: str) -> None:
    saved = (ROOT / f"docs/pictures/{name}.svg").read_text()
    assert saved == str(diagrams.DIAGRAMS[name]()), "run python docs/_make/diagrams.py"
    assert f"pictures/{name}.svg" in (ROOT / "docs/kernels.md").read_text()


def _strings() -> str:
    """Every piece of text in the program, adjoining literals joined."""
    pieces = set()
    for folder in ("avmae_fast", "kernels/avmae_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces.add(node.value)
    return "\n".join(pieces)


def test_messages_are_the_programs_own() -> None:
    text, said = (ROOT / "docs/troubleshooting.md").read_text(), _strings()
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 40
    pieces = [piece.strip() for message in messages for piece in message.split("...")]
    assert [piece for piece in pieces if piece not in said] == []


def test_fields_exist() -> None:
    """`train.batch` and the like, wherever they are in the text."""
    owners = [owner for module in (config, finetune_config) for owner in vars(module).values()]
    fields = {name for owner in owners for name in getattr(owner, "__dataclass_fields__", ())}
    fields |= {"size"}  # of [model]: stands for two of its tables
    for page in PAGES:
        for name in re.findall(r"`(?:data|train|model)\.([a-z_.]+)", page.read_text()):
            parts = set(name.split("."))
            assert parts <= fields | {"safetensors"}, f"{page.name}: there is no field {name}"
