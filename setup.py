"""How the compiled part, `csrc/`, is built; everything else about the package is in pyproject.toml.

AVMAE_CSRC=auto (the default) builds it where a C++ compiler works and installs without it where
none does, 1 insists on it, 0 leaves it out.
"""

import os
import textwrap
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

CSRC = os.environ.get("AVMAE_CSRC", "auto")
if CSRC not in ("auto", "0", "1"):
    raise SystemExit(f"AVMAE_CSRC must be auto, 0 or 1, got {CSRC!r}")


def report_skipped(error: Exception) -> None:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
    print(
        f"avmae_fast: csrc/ is not compiled ({reason}). Masks and crops will come from NumPy, "
        "which is slower. Install a C++17 compiler and Python's headers, then reinstall.",
        flush=True,
    )


class BuildExtension(build_ext):
    """Under AVMAE_CSRC=auto a compiler that is missing or fails costs the extension alone."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if CSRC == "1":
                raise
            report_skipped(error)
            # A module left from an earlier build would be older than the sources beside it.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)


def extensions() -> list[Extension]:
    if CSRC == "0":
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        if CSRC == "1":
            raise
        report_skipped(error)
        return []
    return [
        Pybind11Extension(
            "avmae_kernels._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=[] if os.name == "nt" else ["-O3"],
            # setuptools tolerates the missing module of an optional extension.
            optional=CSRC == "auto",
        )
    ]


setup(
    version="0.1.0",
    # kernels/ is a source root, as src/ is elsewhere; its one package is avmae_kernels. The
    # folder is not itself importable: on PyPI `kernels` is Hugging Face's.
    package_dir={"avmae_kernels": "kernels/avmae_kernels"},
    packages=find_packages(include=["avmae_fast", "avmae_fast.*"]) + find_packages("kernels"),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
