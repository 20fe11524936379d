"""Shipped kernel configurations compile for sm_80 and sm_90 and keep their promises, without a GPU.

A regression here is a configuration that spills, outgrows shared memory, lost its tensor-core
instructions or its 128-bit accesses, or no longer fits often enough on an SM. A fifth of them, each
kernel among them, is looked at by default; all of them take minutes and are marked slow, and
`python -m benchmarks.resources` fails on them too.
"""

import dataclasses
from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install triton)")

from avmae_kernels._resources import CompileCase, Resources, blocks_per_sm, shortfalls  # noqa: E402
from benchmarks import resources  # noqa: E402

CASES = resources.cases()


def _sample(every: int) -> list[CompileCase]:
    """One in `every`, counted for each kernel and architecture, from its first case on."""
    seen: Counter[tuple[str, str, int]] = Counter()
    chosen = []
    for case in CASES:
        group = (case.op, case.kernel.__name__, case.arch)
        if seen[group] % every == 0:
            chosen.append(case)
        seen[group] += 1
    return chosen


def _assert_kept(cases: list[CompileCase]) -> None:
    rows = [resources.row(case, got) for case, got in resources.measure(cases, workers=2)]
    broken = [row for row in rows if row["faults"]]
    assert not broken, "\n" + resources.table(broken)


def test_a_fifth_of_the_configurations() -> None:
    _assert_kept(_sample(5))


@pytest.mark.slow
def test_every_configuration() -> None:
    _assert_kept(CASES)


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 0


def test_both_architectures_everywhere() -> None:
    archs = {op: {c.arch for c in CASES if c.op == op} for op in {c.op for c in CASES}}
    assert all(found == {80, 90} for found in archs.values()), archs


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks"),
    [
        # By hand from the programming guide's table: registers, threads, blocks, shared memory.
        (90, 128, 4, 0, 4),
        (90, 129, 4, 0, 3),
        (90, 32, 4, 0, 16),
        (90, 255, 8, 0, 1),
        (90, 32, 1, 0, 32),
        (80, 64, 4, 81 * 1024, 2),
        (80, 64, 4, 82 * 1024, 1),
        (80, 64, 4, 163 * 1024, 1),
        (80, 64, 4, 164 * 1024, 0),
        (90, 64, 4, 164 * 1024, 1),
        (90, 64, 4, 228 * 1024, 0),
    ],
)
def test_blocks_on_an_sm(arch: int, registers: int, warps: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(arch, registers, warps, shared) == blocks


CASE = CompileCase("op", "config", None, 90, {}, {}, num_warps=4, tensor_cores=True, min_blocks=2)
GOOD = Resources(128, 0, 1024, 4, 4, {"HGMMA": 1, "LDG.128": 1, "LDG": 1, "STG.128": 1, "STG": 1})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 3}, "3 register spills"),
        ({"shared_bytes": 2**18, "blocks_per_sm": 0}, "262144 bytes of shared memory"),
        ({"blocks_per_sm": 1}, "1 blocks an SM, wanted 2"),
        ({"instructions": {"HMMA": 1, "LDG.128": 1, "STG.128": 1}}, "no HGMMA"),
        ({"instructions": {"HGMMA": 1, "LDG.64": 1, "STG.128": 1}}, "no 128-bit load"),
        ({"instructions": {"HGMMA": 1, "LDG.128": 1, "STG.64": 1}}, "no 128-bit store"),
        ({"instructions": GOOD.instructions | {"LDG.16": 2}}, "2 loads of 16 or 8 bits"),
        ({"instructions": GOOD.instructions | {"STG.8": 2}}, "2 stores of 16 or 8 bits"),
        ({"instructions": GOOD.instructions | {"ATOM": 1}}, "1 atomics"),
    ],
)
def test_shortfalls_are_seen(change: dict, fault: str) -> None:
    assert shortfalls(CASE, GOOD) == []
    (found,) = shortfalls(CASE, dataclasses.replace(GOOD, **change))
    assert fault in found


def test_missing_bulk_loads_are_seen() -> None:
    case = dataclasses.replace(CASE, descriptors=True)
    assert shortfalls(case, GOOD) == ["no bulk load (UTMALDG)"]
    bulk = dataclasses.replace(GOOD, instructions=GOOD.instructions | {"UTMALDG": 1})
    assert shortfalls(case, bulk) == []


def test_table_names_what_did_not_compile() -> None:
    case = dataclasses.replace(CASES[0], config="broken")
    rows = [resources.row(case, "CompilationError: at 3:4")]
    assert "not compiled\n    FAULT CompilationError: at 3:4" in resources.table(rows)
