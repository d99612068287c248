"""Devices by name, and whether CUDA is here. Asks neither torch nor the driver, so that listings answer at once."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from ctxbench.errors import UserError, unknown

KINDS = ("cpu", "cuda")


def cuda_present() -> bool:
    """Whether an NVIDIA driver and a torch build that can use it are here; asks neither of them."""
    driver = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu"))
    return driver and "+cpu" not in torch_version()


def torch_version() -> str:
    """Version of the installed torch, which is not imported."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def parse_devices(chosen: Sequence[str]) -> list[str]:
    """Device names as cells have them: ``auto`` is decided, ``cuda:0`` is ``cuda``, each stands once.

    Raises:
        UserError: for a name that is no device, or none.
    """
    found: list[str] = []
    for name in chosen:
        device = ("cuda" if cuda_present() else "cpu") if name == "auto" else "cuda" if name == "cuda:0" else name
        kind, colon, index = device.partition(":")
        if kind not in KINDS or (colon and (kind == "cpu" or not index.isdigit())):
            raise unknown("device", str(name), ["cpu", "cuda", "cuda:1", "auto"], "see `ctxbench list devices`")
        if device not in found:
            found.append(device)
    if not found:
        raise UserError("the axis is empty\n  accepted: cpu, cuda, cuda:1, auto")
    return found
