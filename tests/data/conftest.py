"""Tiny sets on the disk, written as users write them: WebDataset's TarWriter, then the index."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from pipeline.data import images, latents
from pipeline.data.index import build_index

Sample = dict[str, Any]  # "__key__" and the bytes of each part
WriteTar = Callable[..., Path]


class LatentSet(NamedTuple):
    folder: Path
    moments: list[list[NDArray[np.float16]]]  # by shard and row, each [8,2,2]
    labels: list[list[int]]


class ImageSet(NamedTuple):
    folder: Path
    pixels: list[list[NDArray[np.uint8]]]  # by shard and row, each [12,12,3]


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    """write_tar(path, samples, **arguments of TarWriter) → path."""

    def write(path: Path, samples: Iterable[Sample], **settings: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, TarWriter(file, **{"mtime": 0, "encoder": False} | settings) as writer:
            for sample in samples:
                writer.write(sample)
        return path

    return write


@pytest.fixture(scope="session")
def latent_set(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> LatentSet:
    """25 samples in uneven shards, one of them empty.  To be read, never changed."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    moments = [[rng.normal(size=(8, 2, 2)).astype(np.float16) for _ in range(count)] for count in (7, 0, 5, 13)]
    labels = [[int(rng.integers(10)) for _ in of_shard] for of_shard in moments]
    for shard, of_shard in enumerate(moments):
        samples = (
            {
                "__key__": f"{shard}-{row:03d}",
                latents.PART: latents.moments_to_bytes(array),
                "cls": str(labels[shard][row]).encode(),
            }
            for row, array in enumerate(of_shard)
        )
        write_tar(folder / f"{shard:03d}.tar", samples)
    build_index(folder, (frozenset({latents.PART}),))
    return LatentSet(folder, moments, labels)


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> ImageSet:
    """9 PNGs in two shards; the label of an image is its number.  To be read, never changed."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    pixels = [[rng.integers(0, 256, (12, 12, 3), dtype=np.uint8) for _ in range(count)] for count in (4, 5)]
    number = 0
    for shard, of_shard in enumerate(pixels):
        samples: list[Sample] = []
        for array in of_shard:
            samples.append({"__key__": f"{number:03d}", "png": images.encode_png(array), "cls": str(number).encode()})
            number += 1
        write_tar(folder / f"{shard:03d}.tar", samples)
    build_index(folder, (images.PARTS,))
    return ImageSet(folder, pixels)
