"""Small sets of image shards with samples that can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from pipeline.data import images
from pipeline.data.index import build_index

Parts = dict[str, bytes]
BAD: dict[str, tuple[Parts, str]] = {  # what a good sample's parts are laid over, and the reason that is told
    "garbage": ({"png": b"\xff" * 300}, "not a readable JPEG, PNG, WEBP image: none of these"),
    "zero bytes": ({"png": b""}, "not a readable JPEG, PNG, WEBP image: none of these"),
    "a label": ({"cls": b"abc"}, ".cls holds b'abc', an integer was wanted"),
    "a negative label": ({"cls": b"-1"}, "class id -1 came, 0 or more was wanted"),
    "a caption": ({"txt": b"\xff\xfe"}, ".txt is not UTF-8: "),
}


def good(number: int) -> Parts:
    """A sample of a wide picture that only this number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 22, 3), dtype=np.uint8)
    return {"png": images.encode_png(pixels), "cls": str(number % 10).encode(), "txt": f"picture {number}".encode()}


def write_set(folder: Path, shards: Sequence[Sequence[str | Parts]]) -> Path:
    """A shard for each list, with a good sample for "", a bad one for the name of its fault, or these parts.

    Keys are SHARD-ROW.
    """
    folder.mkdir(parents=True)
    number = 0
    for shard, wanted in enumerate(shards):
        with (folder / f"{shard:03d}.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as tar:
            for row, fault in enumerate(wanted):
                parts = good(number) if isinstance(fault, str) else fault
                if fault == "no image":
                    del parts["png"]
                elif isinstance(fault, str) and fault:
                    parts |= BAD[fault][0]
                tar.write({"__key__": f"{shard}-{row}", **parts})
                number += 1
    build_index(folder)
    return folder
