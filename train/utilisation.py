"""How much of its devices a run uses: operations a second, and their share of what there is."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import lru_cache

import torch

from hope import HopeModel
from hope.config import HopeConfig
from train.config import RunConfig

PEAK_TFLOPS = {
    "A100": 312.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "L40S": 362.0,
    "MI300X": 1307.4,
}
"""Of matrix products in bfloat16, dense, accumulated in float32, by what a device's name contains;
the makers' data sheets. More particular names first."""


def known_peak(name: str) -> float | None:
    """10^12 operations a second in bfloat16 of the device of that name; None: not known."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in PEAK_TFLOPS.items() if f" {known} " in words), None)


@lru_cache(maxsize=8)
def needed_flops(config: HopeConfig, seq_len: int) -> float:
    """Operations per token of rows of seq_len, forward and backward, that the mathematics needs:
    nothing twice, of causal attention the half (`hope.flops`)."""
    with torch.device("meta"):
        model = HopeModel(config, seed=None)
    return float(sum(model.flops_per_token(seq_len, executed=False)))


@dataclass(frozen=True)
class Utilisation:
    """What a rate in tokens a second is of the devices' own.

    flops: of a token (`needed_flops`); ranks: devices; peak_tflops: of one device, None where it is
    not known, or the run does not compute in what it is known for.
    """

    flops: float
    ranks: int
    peak_tflops: float | None

    @classmethod
    def of_run(cls, config: RunConfig, ranks: int, device: torch.device) -> Utilisation:
        """Of a run on so many ranks with a device of that kind each."""
        peak = config.training.peak_tflops
        if peak is None and device.type == "cuda" and config.parallel.precision == "bf16":
            peak = known_peak(torch.cuda.get_device_name(device))
        return cls(needed_flops(config.model, config.data.seq_len), ranks, peak)

    def tflops_per_rank(self, tokens_per_second: float) -> float:
        """10^12 operations a second on each rank, at that rate of all ranks together."""
        return self.flops * tokens_per_second / self.ranks / 1e12

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B): needed operations
        over those that the devices could do; None where that is not known."""
        if self.peak_tflops is None:
            return None
        return self.tflops_per_rank(tokens_per_second) / self.peak_tflops


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated on the device; on a CPU resident,
    libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
