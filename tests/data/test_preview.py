"""The contact sheet shows the set's own first images with what they are called."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import images
from pipeline.data.index import ShardSet
from pipeline.data.prepare import prepare_digits, prepare_folder
from pipeline.data.preview import GAP, MARGIN, NUM_COLUMNS, TILE, contact_sheet

SIZE = 24


def test_it_shows_the_first_images_pixel_by_pixel(tmp_path: Path) -> None:
    prepare_digits(tmp_path, size=SIZE, seed=0, validation_share=0.2)
    shards = ShardSet(tmp_path / "train", open_shards=1)
    with Image.open(tmp_path / "train" / "preview.png") as image:
        sheet = np.asarray(image)
    scale = TILE // SIZE
    for i in range(NUM_COLUMNS):
        left = MARGIN + i * (TILE + GAP)
        tile = sheet[MARGIN : MARGIN + TILE : scale, left : left + TILE : scale]
        assert np.array_equal(tile, images.decode(shards.read(0, i)[1]["png"], SIZE))
    assert (sheet[MARGIN + TILE + 2 :, MARGIN : MARGIN + TILE] < 128).any()  # captions


def test_small_sets_and_long_or_missing_texts_fit() -> None:
    tile = np.zeros((TILE, TILE, 3), dtype=np.uint8)
    for texts in (["x" * 10_000], ["word " * 1000, ""], ["", ""], ["two\nlines", "写真"]):
        sheet = np.asarray(contact_sheet([(tile, text) for text in texts]))
        assert sheet.shape[1] == 2 * MARGIN + len(texts) * (TILE + GAP) - GAP
        edges = (sheet[: MARGIN - 1], sheet[-MARGIN // 2 :], sheet[:, : MARGIN - 3], sheet[:, 3 - MARGIN :])
        assert all((edge == 255).all() for edge in edges)


def test_large_images_are_scaled_down(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "pictures" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / "pictures" / "one" / f"{i}.png")
    prepare_folder(tmp_path / "pictures", tmp_path, size=TILE + 100, seed=0, validation_share=0.5)
    with Image.open(tmp_path / "train" / "preview.png") as sheet:
        assert sheet.width == 2 * MARGIN + 2 * (TILE + GAP) - GAP
