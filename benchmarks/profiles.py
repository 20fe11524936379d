"""Device time of one call, kernel by kernel and in groups that a reader knows."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import device as devices

# The first pattern that a kernel's name holds decides its group.
GROUPS: dict[str, str] = {
    "attention": r"attention|flash|fmha|sdpa|cudnn.*(sdp|attn)|slot_owners|delta_kernel|fwd_kernel",
    "products": r"gemm|cutlass|wgmma|nvjet|addmm|\bmm\b|xmma|_(tn|nn|nt)(_|$)",
    "LayerNorm and residual": r"norm",
    "GELU": r"gelu",
    "optimiser": r"adam|multi_tensor",
    "copies and casts": r"memcpy|memset|copy|cast|_to_copy",
    "reductions": r"reduce|sum",
    "loss, patches, sequences": r"loss|patch|gather|scatter|assemble|index|fft|unfold",
}
OTHER = "other"
_SHOWN = 80


def group_of(kernel: str) -> str:
    for group, pattern in GROUPS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return group
    return OTHER


def kernel_times(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """`groups`: ms of each group; `kernels`: the longest, with calls and ms."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        devices.synchronize(device)
    found = []
    for event in profiler.key_averages():
        on_gpu = device.type == "cuda"
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us > 0:
            found.append({"kernel": event.key[:200], "calls": event.count, "ms": us / 1e3})
    found.sort(key=lambda row: -row["ms"])
    groups: dict[str, float] = {}
    for row in found:
        group = group_of(row["kernel"])
        groups[group] = groups.get(group, 0.0) + row["ms"]
    return {"groups": groups, "kernels": found[:_SHOWN]}
