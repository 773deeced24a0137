"""Where networks run: on the GPU where there is one, else on the CPU."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The device of every network that is sampled, fitted or asked."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
