"""What mkdocs calls while it builds: pages that are made rather than written.

cli.md       from the parsers of the program
others       from Markdown files that live elsewhere in the repository, see `ELSEWHERE`
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# The checkout that the pages belong to, whatever is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import cli_reference  # noqa: E402

ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "benchmark_notes.md": "benchmarks/NOTES.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    files.append(File.generated(config, "cli.md", content=cli_reference.page()))
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=moved(source)))
    return files


def moved(source: str) -> str:
    """The text of a file of the repository, its links as they are from `docs/`.

    Raises:
        FileNotFoundError: it links to a file that is not there.
    """
    pages = {path: page for page, path in ELSEWHERE.items()}

    def relink(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source} links to {target}, which is not there")
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        # Code is not part of the site.
        return f"`{path}`"

    return _LINK.sub(relink, (ROOT / source).read_text())
