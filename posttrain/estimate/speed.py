"""Floating-point operations a token, how many a second the hardware does, and what that makes.

Operations are those of Kaplan et al., 2020 (arXiv:2001.08361, section 2.1) with the attention term
of Chowdhery et al., 2022 (arXiv:2204.02311, appendix B), whose model FLOPs utilisation this is:
operations that the model needs over the peak, recomputation not counted.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from posttrain.estimate.architecture import Architecture
from posttrain.estimate.device import Device, cpu_name, present_device
from posttrain.hardware import ResolvedDType
from posttrain.store.files import write_json

GPU_UTILISATION = 0.35
"""Share of the peak that fine-tuning reaches on a GPU, assumed. Chowdhery et al. (2022, table 3)
list 0.21 to 0.46 for pretraining, with batches far larger than a fine-tuning's."""
CPU_UTILISATION = 0.35
"""Share of the speed of a float32 product that training reaches on a CPU, assumed: norms,
activation functions and small products do few operations on many bytes."""

PEAK_TFLOPS: tuple[tuple[str, dict[ResolvedDType, float]], ...] = (
    ("GB200", {"bfloat16": 2500, "float16": 2500, "float32": 80}),
    ("B200", {"bfloat16": 2250, "float16": 2250, "float32": 75}),
    ("H200", {"bfloat16": 989, "float16": 989, "float32": 67}),
    ("H100 NVL", {"bfloat16": 835, "float16": 835, "float32": 60}),
    ("H100 PCIe", {"bfloat16": 756, "float16": 756, "float32": 51}),
    ("H100", {"bfloat16": 989, "float16": 989, "float32": 67}),
    ("H20", {"bfloat16": 148, "float16": 148, "float32": 44}),
    ("A100", {"bfloat16": 312, "float16": 312, "float32": 19.5}),
    ("A40", {"bfloat16": 149.7, "float16": 149.7, "float32": 37.4}),
    ("A30", {"bfloat16": 165, "float16": 165, "float32": 10.3}),
    ("A10G", {"bfloat16": 70, "float16": 70, "float32": 31.5}),
    ("A10", {"bfloat16": 125, "float16": 125, "float32": 31.2}),
    ("L40S", {"bfloat16": 362, "float16": 362, "float32": 91.6}),
    ("L40", {"bfloat16": 181, "float16": 181, "float32": 90.5}),
    ("L4", {"bfloat16": 121, "float16": 121, "float32": 30.3}),
    ("V100", {"float16": 125, "float32": 15.7}),
    ("T4", {"float16": 65, "float32": 8.1}),
    ("RTX 6000 Ada", {"bfloat16": 364, "float16": 364, "float32": 91.1}),
    ("RTX A6000", {"bfloat16": 154.8, "float16": 154.8, "float32": 38.7}),
    ("RTX 5090", {"bfloat16": 209.5, "float16": 209.5, "float32": 104.8}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}),
    ("RTX 4080", {"bfloat16": 97.5, "float16": 97.5, "float32": 48.7}),
    ("RTX 3090", {"bfloat16": 71, "float16": 71, "float32": 35.6}),
    ("RTX 3080", {"bfloat16": 59.5, "float16": 59.5, "float32": 29.8}),
)
"""Dense peak of a GPU in 10^12 operations a second: tensor cores with float32 accumulation for 16
bits, and without tensor cores for float32. From NVIDIA's data sheets of each product, and for
GeForce the architecture whitepapers (Ampere GA102, Ada, Blackwell); their figures with sparsity are
halved. A longer name stands before one that it begins with."""


def flops_per_token(sizes: Architecture, trainable: int | None = None, length: float = 0) -> float:
    """Operations that training on one token needs: forward and backward pass.

    Two for each matrix entry forward; backward two for the gradient of the activations and, where
    the entry is trained, two for its own. So 6N with all weights trained and 4N + 2T with T trained
    parameters beside frozen ones. Attention adds 12 operations for each layer, query width and
    token attended to, of which a causal row of length L has L / 2 on average.

    Args:
        sizes: The model.
        trainable: Trained parameters; None or all of them for full training.
        length: Mean row length in tokens, weighted by tokens; 0 leaves attention out.
    """
    entries = sizes.matrix_parameters
    full = trainable is None or trainable >= sizes.parameters
    products = 6.0 * entries if full else 4.0 * entries + 6.0 * (trainable or 0)
    return products + 12 * sizes.layers * sizes.query_width * length / 2


def hardware_flops_per_token(
    sizes: Architecture, trainable: int | None, length: float, checkpointing: bool
) -> float:
    """Operations really done: gradient checkpointing computes the layers' forward pass twice."""
    needed = flops_per_token(sizes, trainable, length)
    if not checkpointing:
        return needed
    return needed + 2.0 * sizes.linear_parameters + 2 * sizes.layers * sizes.query_width * length


def model_flops_utilization(
    tokens_per_s: float,
    sizes: Architecture,
    trainable: int | None,
    length: float,
    dtype: ResolvedDType,
    world_size: int = 1,
) -> float | None:
    """Share of the peak that training reaches (MFU); None where the hardware's peak is unknown.

    Args:
        tokens_per_s: Over all processes.
        sizes: The model.
        trainable: Trained parameters.
        length: Mean row length in tokens, weighted by tokens.
        dtype: What is computed in.
        world_size: GPUs; on a CPU processes share the one there is.
    """
    peak = peak_flops(dtype)
    if peak is None:
        return None
    devices = world_size if present_device().kind == "cuda" else 1
    return tokens_per_s * flops_per_token(sizes, trainable, length) / (peak * devices)


def peak_flops(dtype: ResolvedDType, device: Device | None = None) -> float | None:
    """Operations a second: a GPU's stated peak, or a CPU's speed at a large float32 product.

    A CPU is measured once, in about a third of a second; the result is kept with its name under
    `POSTTRAIN_HOME`. None for an unknown GPU, and for 16 bits on a CPU.
    """
    device = device or present_device()
    if device.kind == "cuda":
        return gpu_peak_flops(device.name, dtype)
    return _cpu_flops() if dtype == "float32" else None


def gpu_peak_flops(name: str, dtype: ResolvedDType) -> float | None:
    """The stated peak of a GPU, by its name as nvidia-smi has it; None for one not listed."""
    for known, peaks in PEAK_TFLOPS:
        if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def utilisation(device: Device) -> float:
    """The share of the peak that an estimate of time assumes."""
    return GPU_UTILISATION if device.kind == "cuda" else CPU_UTILISATION


def _cpu_flops() -> float:
    from posttrain.home import Home

    path = Home.find().root / "cpu-speed.json"
    cores = len(os.sched_getaffinity(0))
    key = f"{cpu_name()} x {cores}"
    known = _read(path)
    if key not in known:
        known[key] = measure_cpu()
        # Among other programs a CPU is slower than it is: such a figure is not kept.
        if os.getloadavg()[0] < cores:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
    return known[key]


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(k): float(v) for k, v in found.items()} if isinstance(found, dict) else {}


def measure_cpu(seconds: float = 0.3) -> float:
    """Operations a second of float32 products by numpy's BLAS on all cores: the best of several.

    Small ones finish between two turns of other programs, large ones occupy many cores.

    Args:
        seconds: How long to try.
    """
    import numpy as np

    best = 0.0
    for size in (384, 1024):
        matrix = np.random.default_rng(0).random((size, size), dtype=np.float32)
        end, tries = time.perf_counter() + seconds / 2, 0
        while tries < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            matrix @ matrix
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
            tries += 1
    return best
