"""Position → sample, with every draw that belongs to it.

A sample's noise, timestep and dropout are drawn here, in the loader's processes, because they are functions of the
position alone: the step loop receives all that is random and draws nothing.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.conditioning import is_dropped
from pipeline.data import draws, images, latents
from pipeline.data.draws import Purpose
from pipeline.data.index import ShardSet
from pipeline.data.order import Order
from pipeline.diffusion.objectives import stratified
from pipeline.errors import SampleError, UsageError

Batch = dict[str, Tensor]


class Samples(Dataset[Batch], ABC):
    """Reads samples by position.  Asked for a list of positions, it gives one batch of stacked tensors.

    An error comes back in the batch's place, as a message: what a loader process raises would reach the step loop as
    a traceback.
    """

    def __init__(self, folder: Path, seed: int, lanes: int, block: int) -> None:
        self.shards = ShardSet(folder, open_shards=lanes)
        self.seed, self.lanes, self.block = seed, lanes, block
        self._order = self._make_order()

    def _make_order(self) -> Order:
        return Order(self.shards.counts, self.seed, self.lanes, self.block)

    @property
    def fingerprint(self) -> str:
        """Of the indexed shards."""
        return self.shards.fingerprint

    @property
    def epoch_length(self) -> int:
        """Positions per epoch, in samples."""
        return self._order.epoch_length

    @abstractmethod
    def sample(self, position: int, parts: dict[str, bytes]) -> dict[str, Any]:
        """The arrays of one sample."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        shard, row = self._order(position)
        try:
            _, parts = self.shards.read(shard, row)
            return self.sample(position, parts)
        except (ValueError, OSError) as error:
            raise UsageError(f"{self.shards.where(shard, row)}: {error}") from None

    def __getitems__(self, positions: list[int]) -> Batch | str:
        try:
            samples = [self[position] for position in positions]
            for position, sample in zip(positions, samples, strict=True):
                self._check_shapes(position, sample, samples[0])
        except UsageError as error:
            return str(error)
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    def _check_shapes(self, position: int, sample: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, array in sample.items():
            if array.shape != wanted[name].shape:
                raise UsageError(
                    f"{self.shards.where(*self._order(position))}: {name} of shape {list(array.shape)} came, "
                    f"{list(wanted[name].shape)} as in the others of its batch was wanted"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = self._make_order()


class ImageSamples(Samples):
    """For the autoencoder: `x` float32 [3,H,W] in [-1,1], `posterior_noise` float32 [C,h,w]."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        lanes: int,
        block: int,
        size: int,
        latent_shape: tuple[int, int, int],
        crop: Literal["centre", "random"] = "centre",
        flip: bool = False,
    ) -> None:
        """`size`: pixels; `latent_shape`: (C, h, w) of the posterior's noise; `crop`, `flip`: see DataConfig."""
        super().__init__(folder, seed, lanes, block)
        self.size, self.latent_shape = size, latent_shape
        self.crop: Literal["centre", "random"] = crop
        self.flip = flip

    def sample(self, position: int, parts: dict[str, bytes]) -> dict[str, Any]:
        """See the class."""
        along = draws.uniform(self.seed, Purpose.CROP, position) if self.crop == "random" else None
        mirrored = self.flip and draws.uniform(self.seed, Purpose.FLIP, position) < 0.5
        return {
            "x": images.to_unit(images.decode(image_part(parts), self.size, along=along, mirrored=mirrored)),
            "posterior_noise": draws.normal(self.seed, Purpose.POSTERIOR, position, self.latent_shape),
        }


class LatentSamples(Samples):
    """For the U-Net.  A sample is

    `moments` float32 [2C,h,w], `posterior_noise` and `eps` float32 [C,h,w], `u` float64 in [0,1) (the timestep's
    draw, stratified over the global batch), `class_label` int64, `dropped` bool (see the null condition instead).
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        lanes: int,
        block: int,
        global_batch: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        """`dropout`: share of samples that lose their condition."""
        super().__init__(folder, seed, lanes, block)
        self.global_batch, self.num_classes, self.dropout = global_batch, num_classes, dropout

    def sample(self, position: int, parts: dict[str, bytes]) -> dict[str, Any]:
        """See the class."""
        if latents.PART not in parts:
            raise ValueError(f"no {latents.PART} among its parts {', '.join(sorted(parts))}")
        moments = latents.moments_from_bytes(parts[latents.PART])
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        step, slot = divmod(position, self.global_batch)
        u_0 = draws.uniform(self.seed, Purpose.TIMESTEP, step)
        u_dropout = draws.uniform(self.seed, Purpose.CONDITION_DROPOUT, position)
        return {
            "moments": moments,
            "posterior_noise": draws.normal(self.seed, Purpose.POSTERIOR, position, shape),
            "eps": draws.normal(self.seed, Purpose.NOISE, position, shape),
            "u": np.float64(stratified(u_0, slot, self.global_batch)),
            "class_label": np.int64(class_label(parts, self.num_classes)),
            "dropped": np.bool_(is_dropped(u_dropout, self.dropout)),
        }


def image_part(parts: dict[str, bytes]) -> bytes:
    """The image among a sample's parts.  Raises ValueError."""
    for name, data in parts.items():
        if name in images.PARTS:
            return data
    raise ValueError(f"no image among its parts {', '.join(sorted(parts))}")


def class_label(parts: dict[str, bytes], num_classes: int | None = None) -> int:
    """The integer in `.cls`.  Raises ValueError where it is missing, no number, or out of range."""
    if "cls" not in parts:
        raise ValueError("no .cls part")
    try:
        label = int(parts["cls"])
    except ValueError:
        raise ValueError(f".cls holds {parts['cls'][:40]!r}, an integer was wanted") from None
    if label < 0 or (num_classes is not None and label >= num_classes):
        wanted = (
            "0 or more" if num_classes is None else f"0 to {num_classes - 1} (conditioning.num_classes={num_classes})"
        )
        raise ValueError(f"class id {label} came, {wanted} was wanted")
    return label


def read_images(folder: Path, *, size: int, limit: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N,H,W,3] and labels int64 [N] of a whole set, or of `limit` evenly spaced samples of it.

    Raises UsageError naming the sample where one can't be read.
    """
    shards = ShardSet(folder, open_shards=1)
    places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    if len(places) > limit:
        places = [places[i * len(places) // limit] for i in range(limit)]
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for shard, row in places:
        try:
            _, parts = shards.read(shard, row)
            pixels.append(images.decode(image_part(parts), size))
            labels.append(class_label(parts))
        except (ValueError, OSError) as error:
            raise UsageError(f"{shards.where(shard, row)}: {error}") from None
    if not pixels:
        raise UsageError(f"{folder}: the set is empty")
    return np.stack(pixels), np.array(labels, dtype=np.int64)


def load_batches(
    samples: Samples, positions: Iterable[list[int]], *, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """One batch per list of positions, in order, read ahead by `workers` processes.  Raises UsageError."""
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=cast(Any, _Once(positions)),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_program,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise SampleError(batch)
        yield cast(Batch, batch)


class _Once:
    """An iterable as a batch sampler (DataLoader asks a generator for a length it doesn't have)."""

    def __init__(self, positions: Iterable[list[int]]) -> None:
        self.positions = positions

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.positions)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_program(worker: int) -> None:
    """A signal to the whole job ends the program, and so its loaders; a loader that died first would look broken."""
    del worker
    for polite in (signal.SIGTERM, signal.SIGINT):
        signal.signal(polite, signal.SIG_IGN)
