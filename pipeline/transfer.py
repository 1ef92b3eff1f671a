"""Tensors between host and device, beside the computation: on a GPU over streams of their own, on a CPU not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Transfer:
    """Batches on their way to the device, figures on their way back; the host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device; from pinned memory its copy runs while the step before is computed.

        float64 draws stay on the CPU: they become timesteps there.
        """
        if self._streams is None:
            return self._moved(batch)
        up, compute = self._streams[0], torch.cuda.current_stream(self.device)
        with torch.cuda.stream(up):
            moved = self._moved(batch)
        compute.wait_stream(up)
        for tensor in moved.values():
            if tensor.is_cuda:
                tensor.record_stream(compute)  # its memory belongs to the other stream
        return moved

    def to_host(self, figures: Tensor, summing: dist.Work | None) -> Callable[[], Tensor]:
        """Begin to fetch a tensor, once it is summed over the ranks; what comes back waits for it, and gives it.

        Read in the usual way it would wait for all that was queued since, which is the next step.
        """
        if self._streams is None:
            return lambda: _after(summing, figures)
        down = self._streams[1]
        down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(down):
            if summing is not None:
                summing.wait()  # NCCL's: the stream waits, not the host
            on_host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            on_host.copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        figures.record_stream(down)

        def read() -> Tensor:
            arrived.synchronize()
            return on_host

        return read

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v if v.dtype == torch.float64 else v.to(self.device, non_blocking=True) for k, v in batch.items()}


def _after(summing: dist.Work | None, figures: Tensor) -> Tensor:
    if summing is not None:
        summing.wait()
    return figures
