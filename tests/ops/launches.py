"""Launch kernels where there is no GPU: everything happens but the run itself.

What a launch passes (types, alignments, constants, options) decides what Triton compiles, so this
finds a wrong argument, and a compilation too many, on a machine without a device.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from avmae_kernels._triton import INTERPRET

_DEVICES = itertools.count(1000)


@contextmanager
def compile_only(arch: int) -> Iterator[list[str]]:
    """Inside, a launch compiles for `arch` and runs nothing; yields a name for each compilation.

    Outputs stay as they were allocated.
    """
    assert not INTERPRET, "Triton interprets in this process: it compiles nothing"
    compiled: list[str] = []
    # Kernels are cached by device: a number of its own makes each use start with none.
    device = next(_DEVICES)
    driver = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def without_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **options)

    def counted(kernel: Any, key: Any, *args: Any) -> Any:
        compiled.append(f"{kernel.__name__} {key}")
        return do_compile(kernel, key, *args)

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", without_launch),
        mock.patch.object(JITFunction, "_do_compile", counted),
    ):
        yield compiled
