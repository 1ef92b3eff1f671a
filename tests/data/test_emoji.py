"""Emoji come with their names, whole and in the middle; without the font, the package is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from pipeline import files
from pipeline.data import emoji, images
from pipeline.data.index import ShardSet
from pipeline.data.prepare import prepare_emoji
from pipeline.data.sources import emojis
from pipeline.errors import UsageError


@pytest.fixture(scope="module")
def font() -> Path:
    """Debian's colour emoji font."""
    if not emoji.FONT.is_file():
        pytest.skip(f"{emoji.FONT} is missing (apt-get install {emoji.PACKAGE})")
    return emoji.FONT


@pytest.fixture(scope="module")
def found(font: Path) -> dict[str, str]:
    return dict(emoji.list_emojis(font))


def test_over_a_thousand_have_names(found: dict[str, str]) -> None:
    assert len(found) >= 1280
    assert found["🐢"] == "turtle" and found["😀"] == "grinning face" and found["🦩"] == "flamingo"
    assert len(set(found.values())) == len(found) and all(name == name.lower() for name in found.values())


def test_blank_and_missing_glyphs_are_left_out(font: Path, found: dict[str, str]) -> None:
    assert not {" ", "\xa0", "A", "é", "\u200d", "\ufe0f", "中"} & set(found)
    pictures = [emoji.draw(font, character, 32) for character in found]
    assert all((picture < 250).any() for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(found)  # none is a stand-in for missing ones


def test_they_stand_on_white_in_colour_and_in_the_middle(font: Path) -> None:
    x = emoji.draw(font, "🔴", 64).astype(int)  # [64,64,3]
    assert x.shape == (64, 64, 3) and (x[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = x[32, 32]
    assert red > 200 > 100 > max(green, blue)
    rows, columns = np.nonzero((x < 200).any(axis=-1))
    assert abs(rows.mean() - 31.5) < 1 and abs(columns.mean() - 31.5) < 1


def test_shards_hold_captions_and_no_labels(tmp_path: Path, font: Path, found: dict[str, str]) -> None:
    prepare_emoji(tmp_path, size=16, seed=0, validation_share=0.2, font=font, workers=2)
    names: list[str] = []
    drawn = {name: emoji.draw(font, character, 16) for character, name in found.items()}
    for folder in (tmp_path / "train", tmp_path / "validation"):
        shards = ShardSet(folder, open_shards=1)
        for shard, count in enumerate(shards.counts):
            for row in range(count):
                _, parts = shards.read(shard, row)
                assert set(parts) == {"png", "txt"}
                names.append(parts["txt"].decode())
                assert np.array_equal(images.decode(parts["png"], 16), drawn[names[-1]])
        said = files.read_json(folder / "dataset.json")
        assert said["complete"] and said["label_counts"] == {} and said["made_by"]["prepare"] == "emoji"
    assert sorted(names) == sorted(found.values())


def test_without_the_font_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"none\.ttf: no such font; run: apt-get install .*fonts-noto-color-emoji"
    ) as e:
        prepare_emoji(tmp_path, size=16, seed=0, validation_share=0.2, font=tmp_path / "none.ttf")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_is_no_font_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(UsageError, match=r"a\.ttf: not a font with bitmaps of 109 pixels"):
        emojis(tmp_path / "a.ttf", 16)


def test_a_font_of_letters_is_refused(tmp_path: Path) -> None:
    font = ImageFont.load_default(size=12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    (tmp_path / "letters.ttf").write_bytes(font.font_bytes)
    with pytest.raises(UsageError, match="a colour emoji font was wanted"):
        emojis(tmp_path / "letters.ttf", 16)
