"""Drawn images as PNG files that say in themselves how they were drawn, so that a folder of them can be gone on with.

What a file says: a JSON object in the PNG's text chunk `sample` (iTXt, UTF-8), here called its row.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline import files
from pipeline.asking import Wanted
from pipeline.errors import UsageError

Row = dict[str, Any]
KEY = "sample"  # of the text chunk
ASKED = "asked.json"  # what the folder's images are to be: written before the first of them
LISTED = "samples.jsonl"  # their rows: written after the last of them
SLUG_LETTERS = 40


def rows_of(images: Sequence[Wanted], names: Sequence[str] | None, shared: Row) -> list[Row]:
    """What is said of each image.  `names` of the classes; `shared`: what is the same for all.

    `class`, `prompt`, `negative_class`, `negative_prompt`, `seed` and `guidance` are what the pipeline takes as
    class_labels, prompt, negative_label, negative_prompt, seeds and guidance_scale; null: not told.
    """

    def called(label: int | None) -> str | int | None:
        return label if label is None or names is None else names[label]

    return [
        {
            "index": image.index,
            "class": called(image.asked.label),
            "prompt": image.asked.prompt,
            "negative_class": called(image.negative.label),
            "negative_prompt": image.negative.prompt,
            "seed": image.seed,
            "guidance": image.guidance,
            **shared,
        }
        for image in images
    ]


def project_version() -> str | None:
    """The version that is installed, if one is."""
    try:
        return version("latent-diffusion-pipeline")
    except PackageNotFoundError:
        return None


def file_names(rows: Sequence[Row]) -> list[str]:
    """000012-a-red-house.png: the index, and what of class and prompt is safe in a file's name anywhere."""
    digits = max(6, len(str(len(rows))))
    return [
        "-".join(filter(None, [f"{row['index']:0{digits}d}", slug(row["class"]), slug(row["prompt"])])) + ".png"
        for row in rows
    ]


def slug(said: str | int | None) -> str:
    """Small Latin letters and digits, with hyphens between words; nothing where there are none."""
    plain = unicodedata.normalize("NFKD", "" if said is None else str(said)).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", plain))[:SLUG_LETTERS].strip("-")


def write_png(path: Path, image: NDArray[np.uint8] | Image.Image, said: Row, writer: int = 0) -> None:
    """uint8 [H,W,3] or a picture → a whole PNG file that says this of itself.  `writer`: see files.whole."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(said, ensure_ascii=False, allow_nan=False))
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with files.whole(path, writer) as aside:
        picture.save(aside, format="PNG", pnginfo=info)


def said_by(path: Path) -> Row | None:
    """What a PNG file says of itself; None where it is missing, torn, or says nothing."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = image.info.get(KEY)
            image.verify()  # every chunk against its CRC, to the last
        return files.as_object(str(found).encode(), str(path)) if found is not None else None
    except (OSError, SyntaxError, ValueError):  # Pillow's words for what is no whole PNG
        return None


def read_png(path: Path) -> NDArray[np.uint8]:
    """The pixels, uint8 [H,W,3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def together(rows: Sequence[Row]) -> dict[str, Any]:
    """{"shared": what all rows say alike, "images": what each says besides}: short where there are many."""
    shared = {key: value for key, value in rows[0].items() if all(row[key] == value for row in rows)}
    return {
        "shared": shared,
        "images": [{key: value for key, value in row.items() if key not in shared} for row in rows],
    }


def claim(folder: Path, rows: Sequence[Row]) -> None:
    """Make the folder one for these images.

    Raises UsageError where it has images already and they are not known to be these, naming the first difference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = together(rows)
    try:
        before: Any = files.read_json(folder / ASKED)
    except (OSError, ValueError):
        before = None
    if before == told:
        return
    if there := sorted(path.name for path in folder.glob("*.png")):
        said = f"{there[0]} is of no command known here" if before is None else difference(before, rows)
        raise UsageError(f"{folder}: has images of another command: {said}. Choose another folder or remove this one")
    (folder / LISTED).unlink(missing_ok=True)
    files.write_json(folder / ASKED, told)


def difference(before: Any, rows: Sequence[Row]) -> str:
    """What was asked for before and is now another thing: the first of them."""
    former = [{**before["shared"], **row} for row in before["images"]]
    if len(former) != len(rows):
        return f"{len(former)} images were asked for, now {len(rows)}"
    for was, now in zip(former, rows, strict=True):
        for key in dict.fromkeys([*was, *now]):
            if was.get(key) != now.get(key):
                return f"image {now['index']}: {key} was {was.get(key)!r}, now {now.get(key)!r}"
    return "nothing that a row says"


def write_list(folder: Path, rows: Sequence[Row]) -> None:
    """samples.jsonl: the rows in order, each with the name of its file."""
    named = ({"file_name": name, **row} for name, row in zip(file_names(rows), rows, strict=True))
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in named)
    files.write_text(folder / LISTED, "".join(lines))
