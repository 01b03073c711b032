"""Accelerators by the names that Ray gives them: memory and how fast it is read.

Memory is what `nvidia-smi` shows as total. A process can use a little less: `DRIVER_BYTES`.

Sources, each looked at on 2026-11-22:
- memory of H100, A100, A10G, L40S, L4 and T4: modal-labs/modal-client pull request 2797 (what
  nvidia-smi reported on each); H200 143,771 MiB and B200 183,359 MiB: nvidia-smi tables in public
  repositories, ten of each alike; V100: 16 GiB and 32 GiB as built.
- what a process sees of it, from vLLM's logs and out-of-memory messages: H100 79.22 GiB (vLLM pull
  request 10511), 79.11 (issue 27508), L40S 44.52 (issue 14011), A100 40 GB 39.39 (Hugging Face,
  PrunaAI results), V100 15.77 (issue 11251): 0.2 to 0.6 GiB below the total.
- bandwidth: NVIDIA's data sheets, as repeated by Google Cloud's machine table (L4 300 GB/s, T4
  320, V100 900, H100 SXM 3,350), by NVIDIA's A100 data sheet
  (SXM: 40 GB 1,555, 80 GB 2,039), H200 4,800, B200 8,000, L40S 864, A10G 600.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

MIB = 2**20
GIB = 2**30
DRIVER_BYTES = int(0.6 * GIB)
"""Of the total, what no process gets: the largest difference seen."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU."""

    name: str
    """As in Ray's `accelerator_type`."""
    memory_bytes: int
    """Total, as nvidia-smi shows it."""
    bytes_per_s: float
    """Peak bandwidth of its memory."""
    is_ray_name: bool = True
    """Whether `accelerator_type: NAME` may be written."""
    has_bfloat16: bool = True
    """Compute capability 8.0 or more; vLLM refuses bfloat16 below."""

    @property
    def usable_bytes(self) -> int:
        """What a process sees as its total."""
        return self.memory_bytes - DRIVER_BYTES


def _gpu(name: str, memory_mib: int, gb_per_s: float) -> Accelerator:
    return Accelerator(name=name, memory_bytes=memory_mib * MIB, bytes_per_s=gb_per_s * 1e9)


_ALL = (
    replace(_gpu("T4", 15360, 320), has_bfloat16=False),
    replace(_gpu("V100", 16384, 900), has_bfloat16=False),
    replace(_gpu("V100-32G", 32768, 900), has_bfloat16=False, is_ray_name=False),
    _gpu("A10G", 23028, 600),
    _gpu("L4", 23034, 300),
    _gpu("A100-40G", 40960, 1555),
    _gpu("L40S", 46068, 864),
    _gpu("A100-80G", 81920, 2039),
    _gpu("H100", 81559, 3350),
    _gpu("H200", 143771, 4800),
    _gpu("B200", 183359, 8000),
)
ACCELERATORS: Mapping[str, Accelerator] = {each.name: each for each in _ALL}
"""Name → accelerator, smaller memory first."""

SIZES_OF: Mapping[str, tuple[str, ...]] = {
    "A100": ("A100-40G", "A100-80G"),
    "V100": ("V100", "V100-32G"),
    "A10": ("A10G",),
}
"""Names of Ray that do not say how much memory: the smallest first."""


def accelerators_of(name: str) -> tuple[Accelerator, ...]:
    """The accelerators that Ray's name may mean, smallest first; empty if it is not known here."""
    return tuple(ACCELERATORS[one] for one in SIZES_OF.get(name, (name,)) if one in ACCELERATORS)
