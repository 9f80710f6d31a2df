"""Number formats of the forward and backward pass, by the names that configurations use."""

import torch

from ced.config import Mode


def half_type(mode: Mode, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type that a mode computes in on a device; None: fp32. A CPU has no fast fp16."""
    if mode == "amp" and device.type == "cpu":
        return None
    return {"amp": torch.float16, "amp_bf16": torch.bfloat16, "off": None}[mode]


def autocast(mode: Mode, device: torch.device) -> torch.autocast:
    """Return the context in which a network computes in the precision of `mode`."""
    half = half_type(mode, device)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)
