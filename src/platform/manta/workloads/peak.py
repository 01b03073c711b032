"""Model FLOPs utilization: what a run computes, against what its accelerator can at most."""

from __future__ import annotations

import re

PEAK_BF16_FLOPS = {
    # Dense bf16, without sparsity, by a part of torch.cuda.get_device_name(). First match wins.
    # H200, H100, A100 and L4 agree with reprints of the named sheets (2026-11); the others were
    # not compared: do so before publishing an MFU of them.
    "B200": 2250e12,  # NVIDIA DGX B200 datasheet: fp8 is 72 PFLOP/s over 8 GPUs with sparsity
    "H200": 989e12,  # NVIDIA H200 datasheet, SXM: 1,979 with sparsity
    "H100 NVL": 835e12,  # NVIDIA H100 datasheet: 1,671 with sparsity
    "H100 PCIe": 756e12,  # NVIDIA H100 PCIe product brief: 1,513 with sparsity
    "H100": 989e12,  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity
    "A100": 312e12,  # NVIDIA A100 datasheet
    "L40S": 362e12,  # NVIDIA L40S datasheet: 733 with sparsity
    "L4": 121e12,  # NVIDIA L4 datasheet: 242 with sparsity
    "MI300X": 1307e12,  # AMD Instinct MI300X datasheet
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of an accelerator by its name; None where it is not known."""
    matches = (
        peak for part, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{part}\b", device_name)
    )
    return next(matches, None)


def flops_per_token(
    num_parameters: int, num_layers: int, hidden_size: int, sequence_length: int
) -> float:
    """Forward and backward FLOPs of one token: 6N + 12·L·H·Q·T.

    As in PaLM (Chowdhery et al., 2022, arXiv:2204.02311), appendix B: N counts the parameters
    that are multiplied, so an input embedding that is not tied to the output is left out;
    H·Q, heads times head size, is the hidden size.
    """
    return 6.0 * num_parameters + 12.0 * num_layers * hidden_size * sequence_length
