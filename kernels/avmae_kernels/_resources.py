"""What a kernel costs on a GPU that is not here: compile it, disassemble it, count.

Triton compiles for an architecture without a device of it; the binary says how many registers and
how much shared memory a block takes and which instructions it runs. Time is not to be had so.
Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avmae_kernels._triton import HAVE_TRITON, INTERPRET, triton

REGISTERS_PER_SM = 65536
BLOCKS_PER_SM = 32
WARPS_PER_SM = 64
# Shared memory a block may ask for, and what an SM has for all of its blocks, in bytes. The
# driver keeps RESERVED_SHARED of it for itself in every block.
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_SHARED = 1024

# What is counted in the disassembly: name in the tables, pattern of the opcode.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.",
    "HGMMA": r"HGMMA\.",
    "LDG.128": r"LDG\.E\S*\.128",
    "LDG.64": r"LDG\.E\S*\.64",
    "LDG.16": r"LDG\.E\S*\.[US]16",
    "LDG.8": r"LDG\.E\S*\.[US]8",
    "LDG": r"LDG\.",
    "LDGSTS.128": r"LDGSTS\.E\S*\.128",
    "LDGSTS": r"LDGSTS\.",
    "STG.128": r"STG\.E\S*\.128",
    "STG.64": r"STG\.E\S*\.64",
    "STG.16": r"STG\.E\S*\.[US]16",
    "STG.8": r"STG\.E\S*\.[US]8",
    "STG": r"STG\.",
    "UTMALDG": r"UTMALDG",
    "UTMASTG": r"UTMASTG",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "SHFL": r"SHFL\.",
    "BAR": r"BAR\.",
    "MUFU.EX2": r"MUFU\.EX2",
    "MUFU.TANH": r"MUFU\.TANH",
    "ATOM": r"(?:ATOMG|ATOM|RED|UTMAREDG)\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
}


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of one kernel, and what its binary must show.

    Attributes:
        op: the operation it belongs to, `add_layer_norm`.
        config: what sets it apart in a table, `forward D768 bf16`.
        kernel: the jitted function; a Gluon one is compiled as Gluon.
        arch: compute capability times ten: 80 or 90.
        signature: type of every argument that is no constexpr: `*bf16`, `i32`, `fp32`,
            `tensordesc<bf16[128, 64]>`.
        constexprs: value of every constexpr argument.
        aligned: arguments divisible by 16; None for every pointer.
        tensor_cores: whether it multiplies, so HGMMA (sm_90) or HMMA (sm_80) must be there.
        mma: the instruction to expect where it is not the architecture's own; small tiles use
            HMMA on sm_90 too.
        wide_loads, wide_stores: whether it streams, so 128-bit (or bulk) accesses must be there
            and 8- or 16-bit ones must not.
        descriptors: whether tiles come through tensor descriptors, so bulk loads must be there.
        min_blocks: blocks that must fit on an SM together.
    """

    op: str
    config: str
    kernel: Any
    arch: int
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None
    aligned: tuple[str, ...] | None = None
    tensor_cores: bool = False
    mma: str | None = None
    wide_loads: bool = True
    wide_stores: bool = True
    descriptors: bool = False
    min_blocks: int = 1

    @property
    def name(self) -> str:
        kernel = getattr(self.kernel, "__name__", str(self.kernel))
        return f"{self.op}: {kernel.strip('_')} {self.config} sm_{self.arch}"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of shared memory a block."""

    registers: int
    spills: int
    shared_bytes: int
    warps: int
    blocks_per_sm: int
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def occupancy(self) -> float:
        """Share of an SM's warps that are resident."""
        return self.blocks_per_sm * self.warps / WARPS_PER_SM


def blocks_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Blocks that fit on one SM together; 0 where not even one does."""
    if shared_bytes > SHARED_PER_BLOCK[arch]:
        return 0
    # Registers are given out in units of 256 a warp, and each of an SM's four schedulers has a
    # quarter of them.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (REGISTERS_PER_SM // 4 // per_warp) // warps
    by_shared = SHARED_PER_SM[arch] // (-(-shared_bytes // 128) * 128 + RESERVED_SHARED)
    return min(by_registers, by_shared, WARPS_PER_SM // warps, BLOCKS_PER_SM)


def compile_kernel(case: CompileCase) -> Any:
    """Triton's compiled kernel of a case; its `asm` holds every stage from ttir to cubin.

    Raises:
        RuntimeError: Triton is missing, or interprets, or a declared argument is not one of the
            kernel's.
    """
    if not HAVE_TRITON or INTERPRET:
        raise RuntimeError("compiling wants Triton installed and TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    if {*case.signature, *case.constexprs} != {*names}:
        odd = sorted({*case.signature, *case.constexprs} ^ {*names})
        raise RuntimeError(f"{case.name}: arguments declared or missing: {odd}")
    aligned = case.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    source = GluonASTSource if case.kernel.is_gluon() else ASTSource
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(
        source(
            fn=case.kernel,
            signature={name: case.signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", case.arch, 32),
        options=options,
    )


def measure(case: CompileCase) -> Resources:
    """Compile a case and read its binary."""
    compiled = compile_kernel(case)
    usage, sass = _disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    registers, warps = int(found[1]), int(compiled.metadata.num_warps)
    shared = int(compiled.metadata.shared)
    count = {name: len(re.findall(rf"\s{code}", sass)) for name, code in INSTRUCTIONS.items()}
    return Resources(
        registers=registers,
        spills=count["LDL"] + count["STL"],
        shared_bytes=shared,
        warps=warps,
        blocks_per_sm=blocks_per_sm(case.arch, registers, warps, shared),
        instructions={name: n for name, n in count.items() if n},
    )


def shortfalls(case: CompileCase, got: Resources) -> list[str]:
    """What the binary of a case lacks, one sentence each; empty where all is well."""
    n = {name: got.instructions.get(name, 0) for name in INSTRUCTIONS}
    faults = []
    if got.spills:
        faults.append(f"{got.spills} register spills")
    if got.shared_bytes > SHARED_PER_BLOCK[case.arch]:
        limit = SHARED_PER_BLOCK[case.arch]
        faults.append(f"{got.shared_bytes} bytes of shared memory, a block has {limit}")
    elif got.blocks_per_sm < case.min_blocks:
        faults.append(f"{got.blocks_per_sm} blocks an SM, wanted {case.min_blocks}")
    mma = case.mma or {80: "HMMA", 90: "HGMMA"}[case.arch]
    if case.tensor_cores and not n[mma]:
        faults.append(f"no {mma}")
    if case.wide_loads and not n["LDG.128"] + n["LDGSTS.128"] + n["UTMALDG"]:
        faults.append("no 128-bit load")
    if case.wide_loads and n["LDG.16"] + n["LDG.8"]:
        faults.append(f"{n['LDG.16'] + n['LDG.8']} loads of 16 or 8 bits")
    if case.descriptors and not n["UTMALDG"]:
        faults.append("no bulk load (UTMALDG)")
    if case.wide_stores and not n["STG.128"] + n["UTMASTG"]:
        faults.append("no 128-bit store")
    if case.wide_stores and n["STG.16"] + n["STG.8"]:
        faults.append(f"{n['STG.16'] + n['STG.8']} stores of 16 or 8 bits")
    if n["ATOM"]:
        faults.append(f"{n['ATOM']} atomics: sums would depend on the order of the blocks")
    return faults


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS of a binary, by the tools that come with Triton."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    # The tool reads files only.
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        os.write(handle, cubin)
        os.close(handle)
        usage = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True
        )
        sass = subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True)
    finally:
        os.unlink(path)
    return usage.stdout, sass.stdout
