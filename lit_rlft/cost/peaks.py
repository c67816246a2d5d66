"""What cards could compute at most, by their makers' data sheets."""

import re
from collections.abc import Mapping

import torch

__all__ = ["PEAKS", "peak_flops", "peak_of"]

PEAKS: Mapping[str, float] = {
    # Blackwell: HGX B200 data sheet, half of its figure with sparsity; RTX Blackwell white paper
    r"B200": 2250e12,
    r"RTX 5090": 209.5e12,
    # Hopper: H200 and H100 data sheets, half of their figures with sparsity
    r"H200 NVL": 835.5e12,
    r"G?H200": 989.4e12,
    r"H100 NVL": 835.5e12,
    r"H100 PCIe": 756.5e12,
    r"H100": 989.4e12,
    # Ada: L4, L40 and L40S data sheets; Ada white paper, with accumulation in fp32
    r"L40S": 362.0e12,
    r"L40": 181.0e12,
    r"L4": 121.0e12,
    r"RTX 4090": 165.2e12,
    r"RTX 4080": 97.5e12,
    # Ampere: A100, A40, A30 and A10 data sheets; GA102 white paper, with accumulation in fp32
    r"A100": 312.0e12,
    r"A40": 149.7e12,
    r"A30": 165.0e12,
    r"A10": 125.0e12,
    r"RTX A6000": 154.8e12,
    r"RTX 3090": 71.0e12,
}
"""Operations per second in bfloat16, dense, by a pattern of the card's name; the first one counts.

A multiplication and an addition are two operations.
"""


def peak_flops(name: str) -> float | None:
    """Return a card's peak in operations per second; None for a card that is not in the table.

    Args:
        name: As `torch.cuda.get_device_name` returns it.
    """
    for pattern, peak in PEAKS.items():
        # A whole word: neither a longer number nor another model, such as the A10G or a 4080 SUPER.
        if re.search(rf"\b{pattern}\b(?! (?:SUPER|Ti|D|Laptop)\b)", name):
            return peak
    return None


def peak_of(device: torch.device) -> float | None:
    """Return the peak of a device in operations per second; None without one in the table."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
