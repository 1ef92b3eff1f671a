"""What GPUs can do by their makers' datasheets, what share of it trainings get, and so how long a run takes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.work import Precision

ASSUMED = "assumption"
ASSUMED_UTILISATION = 0.25


@dataclass(frozen=True)
class Gpu:
    """One kind.  Dense TFLOP/s, without sparsity; memory in GB = 1e9 bytes, as datasheets have it."""

    name: str
    tflops_bf16: float | None  # None: it has none
    tflops_fp16: float
    tflops_fp32: float  # TF32, where there is such
    memory_gb: float
    link_gb_s: float  # to another GPU of its node, in one direction
    source: str  # of these numbers
    utilisation: float = ASSUMED_UTILISATION  # share of the peak that a training of a U-Net gets
    utilisation_source: str = ASSUMED

    def tflops(self, precision: Precision) -> float | None:
        """The peak of this precision; None where the GPU has none."""
        match precision:
            case "fp32":
                return self.tflops_fp32
            case "fp16":
                return self.tflops_fp16
            case "bf16" | "bf16_weights":
                return self.tflops_bf16

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return round(self.memory_gb * 1e9)


# Of Stable Diffusion 2 at 512 pixels from precomputed latents, 2,409 GFLOP an image: 36 images/s, 131, 149.5.
_MOSAIC = "MosaicML diffusion, SD 2 at 512 px, 36 images/s per A100"
_MLPERF_H100 = "published trainings of SD 2 at 512 px, 126 to 136 images/s per H100"
_MLPERF_H200 = "MLPerf Training v5.0, SD 2 at 512 px, 149.5 images/s per H200"
_A100, _H100 = "NVIDIA A100 Tensor Core GPU datasheet", "NVIDIA H100 Tensor Core GPU datasheet"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 312, 312, 156, 40, 300, f"{_A100} (SXM)", 0.28, _MOSAIC),
        Gpu("a100-80", 312, 312, 156, 80, 300, f"{_A100} (SXM)", 0.28, _MOSAIC),
        Gpu("h100-sxm", 989, 989, 494, 80, 450, f"{_H100} (half of its sparse numbers)", 0.32, _MLPERF_H100),
        Gpu("h100-pcie", 756, 756, 378, 80, 64, f"{_H100} (PCIe; half of its sparse numbers)"),
        Gpu("h200", 989, 989, 494, 141, 450, "NVIDIA H200 datasheet (half of its sparse numbers)", 0.36, _MLPERF_H200),
        Gpu("l40s", 362, 362, 183, 48, 32, "NVIDIA L40S datasheet (its dense numbers)"),
        Gpu("a10", 125, 125, 62.5, 24, 32, "NVIDIA A10 datasheet"),
        Gpu("v100", None, 125, 15.7, 32, 150, "NVIDIA V100 datasheet (SXM2, 32 GB; no bf16, no TF32)"),
        Gpu("rtx4090", 165.2, 165.2, 82.6, 24, 32, "NVIDIA Ada GPU architecture whitepaper (fp32 sums)"),
    )
}

CUDA_NAMES = {  # what CUDA calls them
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10": "a10",
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def named(cuda_name: str) -> Gpu | None:
    """The GPU that CUDA calls so; None where it is not in the table."""
    return GPUS[CUDA_NAMES[cuda_name]] if cuda_name in CUDA_NAMES else None


@dataclass(frozen=True)
class Duration:
    """Of a whole run, without waiting for links, storage, checkpoints and pictures."""

    images_per_s: float  # over all GPUs
    days: float
    gpu_hours: float


def duration(num_images: int, flops_per_image: int, *, tflops: float, utilisation: float, num_gpus: int) -> Duration:
    """images × FLOP / (GPUs × peak × utilisation)."""
    rate = num_gpus * tflops * 1e12 * utilisation / flops_per_image
    seconds = num_images / rate
    return Duration(rate, seconds / 86_400, seconds * num_gpus / 3600)
