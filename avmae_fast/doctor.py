"""What this machine can do, tried in some twenty seconds: a report to paste into a bug thread.

It names versions, devices and back ends, and no user, host or home directory.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.data.readers import reader_problems
from avmae_fast.models import AudiovisualMAE, TokenMask
from avmae_kernels import masking
from avmae_kernels._ptxas import use_newest_ptxas
from avmae_kernels._triton import HAVE_TRITON, INTERPRET
from avmae_kernels.attention_backends import describe
from avmae_kernels.masking import MaskSpec, sample_masks
from avmae_kernels.self_check import Use, Verdict, self_check

_PACKAGES = ("avmae_fast", "torch", "triton", "numpy", "av", "torchcodec", "decord2", "safetensors")
_PACKAGES_OF_OTHERS = ("timm", "transformers")
# What is timed: long enough to tell, short enough to wait for.
_TIMED_S = 4.0
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` is False where something asked for does not work."""

    section: str
    name: str
    text: str
    ok: bool = True


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All findings, in order, and what keeps this machine from training, if anything does."""

    findings: tuple[Finding, ...]
    obstacles: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.obstacles

    def __str__(self) -> str:
        lines, section = [], ""
        for found in self.findings:
            if found.section != section:
                section = found.section
                lines += ["", section]
            lines.append(f"  {'' if found.ok else '! '}{found.name}: {found.text}")
        verdict = "avmae_fast can train here"
        if self.obstacles:
            verdict = "avmae_fast cannot train here: " + "; ".join(self.obstacles)
        return "\n".join([*lines[1:], "", verdict])

    def to_dict(self) -> dict[str, Any]:
        """The same for a JSON file."""
        findings = [dataclasses.asdict(found) for found in self.findings]
        return {"usable": self.usable, "obstacles": list(self.obstacles), "findings": findings}


def examine(device: torch.device | None = None) -> Diagnosis:
    """Look at this machine and try the operations and a small training step on it.

    Args:
        device: what to try; by default the first GPU, or the CPU where there is none.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = [*_versions(), *_host(), *_gpus(), *_compiler(), *_attention(device), *_data()]
    obstacles = []
    if all(reader_problems().values()):
        obstacles.append("no reader of media files loads (pip install av)")
    for section, attempt in (("operations", _operations), ("training", _training)):
        try:
            findings += attempt(device)
        except Exception as error:  # whatever it is, it is what the report is for
            findings.append(Finding(section, type(error).__name__, _one_line(error), ok=False))
            obstacles.append(f"{section} failed with {type(error).__name__}")
    obstacles += [f"{f.name}: {f.text}" for f in findings if f.section == "training" and not f.ok]
    return Diagnosis(tuple(findings), tuple(dict.fromkeys(obstacles)))


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    for name in (*_PACKAGES, *_PACKAGES_OF_OTHERS):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            text = "not installed"
        if name == "torch":
            text = f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
        yield Finding("versions", name, text)


def _host() -> Iterator[Finding]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    yield Finding("host", "cores", f"{allowed} of {os.cpu_count()}, {threads} threads in torch")
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        pages = [os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")]
        total, free = (count * os.sysconf("SC_PAGE_SIZE") / _GIB for count in pages)
        yield Finding("host", "memory", f"{free:.1f} GiB free of {total:.1f} GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        yield Finding("host", "shared memory", f"{usage.free / _GIB:.1f} GiB free, for workers")


def _gpus() -> Iterator[Finding]:
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        cause = "no NVIDIA driver was found" if driver is None else f"driver {driver} is there"
        if torch.version.cuda is None:
            cause += "; this torch is built without CUDA"
        yield Finding("GPU", "none", f"everything runs on the CPU ({cause})")
        return
    yield Finding("GPU", "driver", driver or "nvidia-smi did not say")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        old = (properties.major, properties.minor) < (8, 0)
        text = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"
        )
        note = "; the kernels want 8.0 or later" if old else ""
        yield Finding("GPU", f"cuda:{number}", text + note, ok=not old)


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _compiler() -> Iterator[Finding]:
    if INTERPRET:
        text = "run in Triton's interpreter (TRITON_INTERPRET=1): for tests, not for training"
        yield Finding("kernels", "Triton kernels", text, ok=False)
    elif not HAVE_TRITON:
        text = "plain PyTorch in their place: Triton is not installed (Linux: pip install triton)"
        yield Finding("kernels", "Triton kernels", text, ok=not torch.cuda.is_available())
    elif not torch.cuda.is_available():
        yield Finding("kernels", "Triton kernels", "not used without a GPU")
    else:
        yield Finding("kernels", "Triton kernels", "used")
    yield Finding("kernels", "ptxas", _without_home(use_newest_ptxas()))


def _attention(device: torch.device) -> Iterator[Finding]:
    for line in describe(device):
        name, _, text = line.partition(": ")
        yield Finding("attention", name.removeprefix("attention "), _without_home(text))


def _data() -> Iterator[Finding]:
    for reader, problem in reader_problems().items():
        yield Finding("data", f"reader {reader}", _without_home(problem or "ready"))
    compiled = masking.implementation().__name__.endswith("_C")
    text = "compiled" if compiled else "from NumPy, the same but slower: no C++ compiler was found"
    yield Finding("data", "masks", text)


def _operations(device: torch.device) -> Iterator[Finding]:
    """Forward and backward against float64: the kernels on a GPU, on a CPU what defines them."""
    use = Use(
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        widths=(768, 384),
        hidden=(3072,),
        head_dims=(64, 32),
        video_patch=(2, 16, 16),
        audio_patch=(16, 16),
    )
    start = time.perf_counter()
    verdicts = self_check(device, use)
    seconds = time.perf_counter() - start
    for operation in dict.fromkeys(verdict.operation for verdict in verdicts):
        yield _verdict([v for v in verdicts if v.operation == operation])
    yield Finding("operations", "time", f"{seconds:.1f} s, compilation included")


def _verdict(verdicts: list[Verdict]) -> Finding:
    name, worst = verdicts[0].operation, max(v.share for v in verdicts)
    wrong = [v.case for v in verdicts if not v.passed]
    text = f"right, worst error {worst:.2g} of what is allowed ({len(verdicts)} cases)"
    if wrong:
        text = f"WRONG for {', '.join(wrong)}; plain PyTorch is used instead"
    return Finding("operations", name, text, ok=not wrong)


def _training(device: torch.device) -> Iterator[Finding]:
    """Some steps of a small model on one batch of noise: the loss must fall."""
    config, batch = _small_model(device)
    torch.manual_seed(0)
    model = AudiovisualMAE(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = _inputs(config, batch, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    last, step_s = _repeat(step)
    fell = last < first
    yield Finding(
        "training", "loss", f"{first:.4f} to {last:.4f}{'' if fell else ': did not fall'}", ok=fell
    )
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, batch {batch}"
    yield Finding("training", "speed", f"{batch / step_s:.1f} clips a second ({size})")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / _GIB
        yield Finding("training", "peak memory", f"{peak:.2f} GiB")


def _repeat(step: Callable[[], float]) -> tuple[float, float]:
    """The result of the last call in `_TIMED_S` and the time of one; the first is not timed."""
    step()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < _TIMED_S:
        result, calls = step(), calls + 1
    return result, (time.perf_counter() - start) / calls


def _small_model(device: torch.device) -> tuple[ModelConfig, int]:
    """A model and batch to try: ViT-B as released on a GPU, a toy on a CPU."""
    if device.type == "cuda":
        return ModelConfig.of_size("B"), 16
    stack = StackConfig(width=96, layers=4, heads=3, mlp=384)
    video = VideoConfig(frames=4, height=64, width=64)
    audio = AudioConfig(frames=96)
    return ModelConfig(encoder=stack, decoder=stack, video=video, audio=audio), 4


def _inputs(config: ModelConfig, batch: int, device: torch.device) -> dict[str, Any]:
    v, a = config.video, config.audio
    assert v is not None and a is not None
    draw = torch.Generator().manual_seed(0)
    shape = (batch, v.frames, v.height, v.width, 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    audio = torch.randn(batch, a.frames, a.mel_bins, generator=draw)
    masks = {}
    for m in config.modalities:
        spec = MaskSpec("random", config.input(m).grid, config.input(m).mask_ratio)
        drawn = sample_masks(spec, torch.arange(batch).numpy(), seed=0, modality=m)
        masks[m] = TokenMask.from_numpy(drawn, device)
    return {"video": video.to(device), "audio": audio.to(device), "masks": masks}


def _without_home(text: str) -> str:
    """A text without the folder of the user, or the names above an environment's own folder."""
    for folder, short in ((sys.prefix, "<environment>"), (str(Path.home()), "~")):
        text = text.replace(folder, short)
    return text


def _one_line(error: Exception) -> str:
    return _without_home(" ".join(str(error).split()))[:400]
