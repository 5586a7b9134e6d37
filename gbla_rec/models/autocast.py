"""The precision of the dense part."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 products on CUDA, with fp32 weights, tables and losses; fp32 on CPU, where bf16 is slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
