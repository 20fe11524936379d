"""The device under test: its name, state, memory and energy, and the clock that times it."""

import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness

# Read, never set: a card is measured as it is found.
_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def choose(name: str) -> torch.device:
    """`cpu` or `cuda` as asked for.

    Raises:
        BenchmarkError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise harness.BenchmarkError(
            "--device cuda, but torch sees no CUDA device here; --device cpu --tiny tries every "
            "row on tiny shapes"
        )
    return torch.device(name)


def gpu_name(device: torch.device) -> str:
    """What a result calls its device: the driver's name of a GPU, `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def slug(name: str) -> str:
    """The name as a folder of results: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 0 on a CPU, where rotation proves nothing."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def total_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held since `reset_peak`; None on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Give cached memory back, so that what comes next finds the card as the first did."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device's memory is too small."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def elapsed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from the first piece of work that `run` queues to the end of the last."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def state(device: torch.device) -> dict[str, float | None]:
    """Clocks, power and temperature now; empty where nvidia-smi does not answer."""
    if device.type != "cuda":
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = ["nvidia-smi", f"--query-gpu={','.join(_STATE.values())}"]
    try:
        found = subprocess.run(
            [*query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid.removeprefix('GPU-')}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_STATE, map(_number, found.stdout.split(",")), strict=False))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def energy_j(device: torch.device) -> float | None:
    """Joules the card has used since its driver was loaded; None where NVML does not tell."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:
        # Not installed, not permitted, or not known to this card: there is no number then.
        return None


def record(device: torch.device) -> dict[str, Any]:
    """What a result says about its device, beside `harness.environment`."""
    found: dict[str, Any] = {"gpu": gpu_name(device), "device_state": state(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout else None
