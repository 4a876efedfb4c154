"""Where the training volumes lie while tiles are cut from them: on the device, in memory, or on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from czii25d.data.volumes import Volume
from czii25d.errors import InputError

Cache = Literal["auto", "device", "host", "disk"]
DEVICE_SHARE = 0.25  # of a GPU's free memory that volumes may take; the rest is the training's
CGROUPS = Path("/sys/fs/cgroup")
HOST_SHARE = 0.5  # of the machine's memory


def choose_cache(wanted: Cache, size: int, free_on_gpu: int | None, host_memory: int) -> tuple[Cache, str | None]:
    """Choose where volumes lie, and say in one line why it is not the best place.

    Parameters
    ----------
    wanted
        ``"auto"``: on a GPU if there is one and they take at most a quarter of its free memory, or else in the
        machine's if they take at most half of it, or else on disk. Without a GPU: on disk, whose pages the system
        keeps in memory once for all processes. ``"device"``: on the GPU, even if they leave little of it; where that
        cannot be, as ``"auto"``. Any other value is what is chosen.
    size
        Bytes of all volumes.
    free_on_gpu
        Bytes; ``None`` without a GPU.
    host_memory
        Bytes of the machine.

    Returns
    -------
    cache, why
        Not ``"auto"``; ``why`` is ``None`` if it is the best place, or what was asked for.

    Raises
    ------
    InputError
        If there is no such place.
    """
    if wanted not in get_args(Cache):
        raise InputError("key data.cache", f"one of {', '.join(get_args(Cache))}", repr(wanted), "choose one")
    if wanted in ("host", "disk"):
        return wanted, None
    if free_on_gpu is None:
        return "disk", "there is no GPU" if wanted == "device" else None
    if size <= (1.0 if wanted == "device" else DEVICE_SHARE) * free_on_gpu:
        return "device", None
    share = "all" if wanted == "device" else "a quarter"
    why = f"the volumes ({size / 1e9:.1f} GB) would take more than {share} of the GPU's free {free_on_gpu / 1e9:.1f} GB"
    return ("host", why) if size <= HOST_SHARE * host_memory else ("disk", f"{why} and half of the machine's memory")


def load_volumes(volumes: Sequence[Volume], cache: Cache, device: torch.device) -> list[Tensor]:
    """Return volumes as float16 tensors ``(D, H, W)``: on the device, in memory, or as they are mapped from disk."""
    if cache == "host":
        return [torch.from_numpy(np.array(volume.data)) for volume in volumes]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes into them
        mapped = [torch.from_numpy(volume.data) for volume in volumes]
    return [volume.to(device) for volume in mapped] if cache == "device" else mapped


def host_memory() -> int:
    """Return the bytes of memory that this process may have: the machine's, or less where a cgroup says so.

    Containers and SLURM's jobs have such limits (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split("::", 1)[1].lstrip("/") for line in lines if line.startswith("0::")), "")
        for folder in (CGROUPS / own, *(CGROUPS / own).parents):
            if folder.is_relative_to(CGROUPS) and (limit := folder / "memory.max").is_file():
                limits += [int(text) for text in limit.read_text().split() if text.isdigit()]  # or "max"
    return min(limits)
