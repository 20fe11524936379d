"""What every shipped kernel configuration takes of a GPU: registers, shared memory, instructions.

Nothing is run: kernels are compiled for sm_80 and sm_90 and their binaries read, so this works on
any Linux machine with Triton. The exit code is 1 where a configuration falls short of what its
operation promises of it. Results are kept in the temporary folder by a hash of their sources.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas_version

import avmae_kernels
from avmae_kernels import _resources
from avmae_kernels._resources import CompileCase, Resources
from benchmarks import harness


def cases() -> list[CompileCase]:
    """Every shipped configuration of every operation."""
    names = [module.name for module in pkgutil.iter_modules(avmae_kernels.__path__)]
    return [case for name in names if name != "_C" for case in _cases(f"avmae_kernels.{name}")]


@functools.cache
def _cases(module: str) -> tuple[CompileCase, ...]:
    imported = importlib.import_module(module)
    make = getattr(imported, "compile_cases", None)
    return tuple(make()) if make is not None and make.__module__ == module else ()


def measure(
    chosen: Sequence[CompileCase], workers: int
) -> list[tuple[CompileCase, Resources | str]]:
    """Each case with its resources, or with the error that compiling it ended in."""
    # A case is named, not sent: a kernel belongs to the process that imported it.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_measure, [case.name for case in chosen], chunksize=4)
        return list(zip(chosen, found, strict=True))


@functools.cache
def _case_of(name: str) -> CompileCase:
    return next(case for case in cases() if case.name == name)


def _measure(name: str) -> Resources | str:
    case = _case_of(name)
    folder = Path(tempfile.gettempdir()) / f"avmae-resources-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / f"{_key(case)}.json"
    if kept.exists():
        return Resources(**json.loads(kept.read_text()))
    try:
        got = _resources.measure(case)
    except Exception as error:  # The table names it beside its case, and the others go on.
        return f"{type(error).__name__}: {error}"
    harness.write_json(kept, dataclasses.asdict(got))
    return got


def _key(case: CompileCase) -> str:
    """Changes with whatever the binary or what is read from it may depend on."""
    settings = dataclasses.replace(case, kernel=case.kernel.cache_key)
    reader = Path(_resources.__file__).read_text()
    text = repr((settings, triton.__version__, get_ptxas_version(case.arch), reader))
    return hashlib.sha256(text.encode()).hexdigest()


def row(case: CompileCase, got: Resources | str) -> dict[str, Any]:
    """A line of the table, for JSON."""
    head = {
        "op": case.op,
        "kernel": case.kernel.__name__.strip("_"),
        "config": case.config,
        "arch": f"sm_{case.arch}",
    }
    if isinstance(got, str):
        return {**head, "faults": [got]}
    return {
        **head,
        **dataclasses.asdict(got),
        "occupancy": got.occupancy,
        "faults": _resources.shortfalls(case, got),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader; of the instructions only what says how a kernel computes and reads."""
    shown = ("HGMMA", "HMMA", "LDG.128", "LDGSTS.128", "UTMALDG", "STG.128", "UTMASTG", "MUFU.EX2")
    width = max((len(_name(row)) for row in rows), default=0)
    lines = [f"{'configuration':{width}} regs spill shared warps blocks   occ  instructions"]
    for line in rows:
        if "registers" in line:
            mix = line["instructions"]
            parts = [f"{name} {mix[name]}" for name in shown if name in mix]
            lines.append(
                f"{_name(line):{width}} {line['registers']:4} {line['spills']:5} "
                f"{line['shared_bytes']:6} {line['warps']:5} {line['blocks_per_sm']:6} "
                f"{line['occupancy']:5.2f}  {', '.join(parts)}"
            )
        else:
            lines.append(f"{_name(line):{width}} not compiled")
        lines += [f"    FAULT {fault}" for fault in line["faults"]]
    return "\n".join(lines)


def _name(line: dict[str, Any]) -> str:
    return f"{line['op']} {line['kernel']} {line['config']} {line['arch']}"


def main(argv: list[str] | None = None) -> int:
    options = harness.parser(__doc__.partition("\n")[0])
    options.add_argument("--workers", type=int, default=2, help="processes that compile (2)")
    args = options.parse_args(argv)
    rows = [row(case, got) for case, got in measure(cases(), args.workers)]
    print(table(rows))
    if args.json is not None:
        ptxas = {f"sm_{arch}": get_ptxas_version(arch).splitlines()[-1] for arch in (80, 90)}
        harness.write_json(args.json, {"rows": rows, "ptxas": ptxas, **harness.environment()})
    return 1 if any(line["faults"] for line in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
