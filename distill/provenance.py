"""What accompanies a figure: commit, machine, memory."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch


def commit() -> str:
    """Commit of the program's checkout, with `+` if changed; `unknown` if there is none."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        changes = ["status", "--porcelain", "--untracked-files=no"]
        status = subprocess.run([*git, *changes], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def hardware(device: torch.device) -> str:
    """The machine in words, to accompany a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch
    if capabilities is not None and capabilities().get("amx_bf16"):
        kind.append("AMX")
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores ({', '.join(kind)}), {threads} thread{'s'[: threads - 1]}"


def memory(device: torch.device) -> dict[str, float]:
    """GiB of this process's resident memory, and on a GPU the most that torch held so far."""
    figures = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        figures["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures
