"""Whatever a user's image is, it becomes size×size RGB, or a ValueError; and pixels survive the way to [-1,1]."""

import functools
import io
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data import images

Pixels = NDArray[np.uint8]
ROOT = Path(__file__).parents[2]


def encoded(image: Image.Image | Pixels, fmt: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format=fmt, **settings)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def slopes(height: int, width: int) -> Pixels:
    """Smooth, and no symmetry: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, np.full((height, width), 60)], axis=-1).astype(np.uint8)


def distance(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other).max())


def psnr_db(one: Pixels, other: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.maximum(np.square(one.astype(float) - other).mean(), 1e-9)))


def in_full(data: bytes, size: int, along: float | None = None) -> Pixels:
    """The square as it was always made: the whole image decoded and turned, then cut and scaled."""
    image = Image.open(io.BytesIO(data))
    turn = images.TURNS.get(image.getexif().get(0x0112, 1))
    image = (image if turn is None else image.transpose(turn)).convert("RGB")
    side, spare = min(image.size), max(image.size) - min(image.size)
    start = spare // 2 if along is None else int(np.floor(along * (spare + 1)))
    left, top = (start, 0) if image.width > image.height else (0, start)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def peak_growth_mib(code: str, data: bytes) -> float:
    """How far a fresh process's peak memory grows over a piece of code that uses `data`."""
    program = f"""
import io, sys
import numpy as np
from PIL import Image
from pipeline.data import images
images.decode(images.encode_png(np.zeros((8, 8), dtype=np.uint8)), 4)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
data = sys.stdin.buffer.read()
{code}
print((peak() - before) / 1024)
"""
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, cwd=ROOT, input=data, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_lossless_images_of_the_right_size_stay_as_they_are(fmt: str) -> None:
    x = noise(16, 16)
    decoded = images.decode(encoded(x, fmt, **({"lossless": True} if fmt == "WEBP" else {})), 16)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, x)


@pytest.mark.parametrize(
    ("fmt", "settings"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})],
    ids=["JPEG", "progressive JPEG", "WebP"],
)
def test_lossy_images_come_close(fmt: str, settings: dict[str, Any]) -> None:
    x = slopes(64, 64)
    assert distance(images.decode(encoded(x, fmt, quality=95, **settings), 64), x) < 16


def test_grey_has_three_equal_channels() -> None:
    x = noise(8, 8, 1)
    for data in (encoded(x), images.encode_png(x)):
        assert np.array_equal(images.decode(data, 8), np.stack([x] * 3, axis=-1))


def test_black_and_white() -> None:
    x = noise(8, 8, 1) > 127
    assert np.array_equal(images.decode(encoded(Image.fromarray(x)), 8)[..., 0], x * np.uint8(255))


def test_palette() -> None:
    image = Image.fromarray(noise(8, 8)).quantize(16)
    assert np.array_equal(images.decode(encoded(image), 8), np.asarray(image.convert("RGB")))


def test_16_bit_grey_keeps_its_greys() -> None:
    x = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(x * np.uint16(257)))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert np.array_equal(images.decode(data, 16)[..., 0], x)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_alpha_lies_on_white(fmt: str) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, np.arange(0, 256, 17).reshape(4, 4)
    decoded = images.decode(encoded(rgba, fmt, **({"lossless": True, "exact": True} if fmt == "WEBP" else {})), 4)
    alpha = rgba[..., 3:] / 255
    assert distance(decoded, np.rint(alpha * rgba[..., :3] + (1 - alpha) * 255).astype(np.uint8)) <= 1
    assert decoded[0, 0].tolist() == [255, 255, 255] and decoded[3, 3].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (Image.fromarray(np.array([[0, 9]], dtype=np.uint8).repeat(2, 0)), 9),
        (Image.fromarray(np.array([[0, 9]], dtype=np.uint8).repeat(2, 0)).convert("P"), 9),
        (Image.fromarray(np.array([[[0, 0, 0], [1, 2, 3]]], dtype=np.uint8).repeat(2, 0)), (1, 2, 3)),
        (Image.fromarray(np.array([[0, 999]], dtype=np.uint16).repeat(2, 0)), 999),
        (Image.fromarray(np.array([[0, 9]], dtype=np.uint8).repeat(2, 0)).convert("LA"), None),
    ],
    ids=["grey", "palette", "RGB", "16-bit grey", "grey with alpha"],
)
def test_a_transparent_value_lies_on_white(image: Image.Image, transparent: Any) -> None:
    if image.mode == "LA":
        image.putpixel((1, 0), (9, 0))
        image.putpixel((1, 1), (9, 0))
        data = encoded(image)
    else:
        data = encoded(image, transparency=transparent)
    assert images.decode(data, 2)[..., 0].tolist() == [[0, 255], [0, 255]]


def test_cmyk_jpeg() -> None:
    image = Image.fromarray(slopes(32, 32))
    data = encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert distance(images.decode(data, 32), np.asarray(image)) < 12


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(orientation: int, fmt: str) -> None:
    upright = slopes(32, 32)
    stored = {  # Exif 2.3, tag 0x0112: where the stored row 0 and column 0 belong
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), fmt, exif=exif, **({} if fmt == "PNG" else {"quality": 95}))
    assert distance(images.decode(data, 32), upright) < 24


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_says_nothing(orientation: int) -> None:
    x = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(images.decode(encoded(x, exif=exif), 8), x)


def broken_exifs() -> list[bytes]:
    exif = Image.Exif()
    exif[0x010E], exif[0x0131] = "words " * 10, "a program"
    whole = exif.tobytes()
    rng = np.random.default_rng(0)
    broken = [whole[:length] for length in range(1, len(whole), 5)]
    for _ in range(200):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            changed[at] = rng.integers(256)
        broken.append(bytes(changed))
    return broken


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_says_nothing(fmt: str, recwarn: pytest.WarningsRecorder) -> None:
    x = slopes(16, 16)
    settings = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[fmt]
    wanted = images.decode(encoded(x, fmt, **settings), 16)
    for exif in broken_exifs():
        assert np.array_equal(images.decode(encoded(x, fmt, exif=exif, **settings), 16), wanted)
    assert not recwarn.list  # thousands of remarks would bury what matters


@pytest.mark.parametrize(("height", "width"), [(20, 33), (33, 20), (20, 21), (20, 200)])
def test_the_centre_is_cut(height: int, width: int) -> None:
    x = noise(height, width)
    top, left = (height - 20) // 2, (width - 20) // 2
    assert np.array_equal(images.decode(encoded(x), 20), x[top : top + 20, left : left + 20])


@pytest.mark.parametrize("size", [8, 16, 31, 64])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (96, 64), (64, 64)])
def test_the_short_side_is_scaled(height: int, width: int, size: int) -> None:
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = slopes(height, width)[top : top + side, left : left + side]
    wanted = np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.BICUBIC))
    decoded = images.decode(encoded(slopes(height, width)), size)
    assert decoded.shape == (size, size, 3) and distance(decoded, wanted) < 12


def test_scaling_down_is_antialiased() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    assert distance(images.decode(encoded(board.astype(np.uint8)), 8), np.full((8, 8, 3), 127)) < 8


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 3)])
def test_tiny_images(height: int, width: int) -> None:
    decoded = images.decode(encoded(np.full((height, width, 3), 77, dtype=np.uint8)), 32)
    assert decoded.shape == (32, 32, 3) and (decoded == 77).all()


REFUSED = {
    "nothing": b"",
    "text": b"a picture of a cat",
    "a gif": encoded(noise(8, 8, 1), "GIF"),
    "a bmp": encoded(noise(8, 8), "BMP"),
    "a tiff": encoded(noise(8, 8), "TIFF"),
    "half a jpeg": (jpeg := encoded(noise(64, 64), "JPEG"))[: len(jpeg) // 2],
    "half a png": (png := encoded(noise(64, 64)))[: len(png) // 2],
    "half a webp": (webp := encoded(noise(64, 64), "WEBP"))[: len(webp) // 2],
    "a jpeg's start": jpeg[:2],
    "a png's start": png[:8],
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_whole_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable JPEG, PNG, WEBP image: "):
        images.decode(data, 8)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_no_damage_raises_anything_but_a_value_error(fmt: str) -> None:
    whole = encoded(noise(16, 16), fmt)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 200), 3):
            data[at] = rng.integers(256)
        try:
            assert images.decode(bytes(data), 8).shape == (8, 8, 3)
        except ValueError:
            refused += 1
    assert refused > 100


def blank_png(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size in few bytes, made without holding its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    packed = b"".join(packer.compress(row * 64) for _ in range(height // 64)) + packer.compress(row * (height % 64))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    pixels = chunk(b"IDAT", packed + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 9500, 12_000, 20_000])
def test_a_bomb_is_refused(side: int) -> None:
    data = blank_png(side, side)
    assert len(data) < 64 * 1024
    with pytest.raises(ValueError, match=r"pixels"):
        images.decode(data, 8)


def test_a_bomb_is_refused_with_little_memory() -> None:
    refused = """
try:
    images.decode(data, 8)
except ValueError:
    pass
else:
    raise SystemExit("it was decoded")
"""
    assert peak_growth_mib(refused, blank_png(9000, 9000)) < 16


def test_a_long_strip_is_scaled_with_little_memory() -> None:
    strip = blank_png(1, 2_000_000)  # scaled up as a whole it would be 256×512,000,000
    assert peak_growth_mib("assert images.decode(data, 256).shape == (256, 256, 3)", strip) < 100


# scaled while it is decoded ------------------------------------------------------------------------


PHOTOGRAPHS: list[Pixels] = load_sample_images().images  # uint8 [427,640,3] each: a temple, a flower
SIZES = [(683, 512), (1024, 768), (2048, 1536)]


@functools.cache
def photograph(number: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(PHOTOGRAPHS[number]).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [64, 128, 170, 256])
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}], ids=["", "progressive", "4:4:4"])
def test_a_jpeg_is_within_40_db_of_its_full_decode(
    number: int, width: int, height: int, size: int, settings: dict[str, Any]
) -> None:
    data = encoded(photograph(number, width, height), "JPEG", quality=90, **settings)
    assert psnr_db(images.decode(data, size), in_full(data, size)) >= 40


@pytest.mark.parametrize(("width", "height"), [(1152, 768), (768, 900), (1535, 1535), (2304, 1536), (1540, 1539)])
def test_where_the_least_is_left_of_a_jpeg_it_is_within_40_db(width: int, height: int) -> None:
    for number in (0, 1):
        data = encoded(photograph(number, width, height), "JPEG", quality=90)
        assert psnr_db(images.decode(data, 256), in_full(data, 256)) >= 40


@pytest.mark.parametrize("number", [0, 1])
def test_a_photograph_as_sharp_as_its_pixels_is_within_39_db(number: int) -> None:
    data = encoded(PHOTOGRAPHS[number], "JPEG", quality=90)
    for size in (35, 71, 142):  # the largest that is read at 1/8, 1/4, 1/2
        assert psnr_db(images.decode(data, size), in_full(data, size)) >= 39
    for size in (26, 53, 106):
        assert psnr_db(images.decode(data, size), in_full(data, size)) >= 44


@pytest.mark.parametrize(
    ("width", "height", "divisor"),
    [
        (500, 375, 1),
        (683, 512, 1),
        (9000, 767, 1),
        (768, 9000, 2),
        (1024, 768, 2),
        (1535, 1535, 2),
        (1536, 1536, 4),
        (2048, 1536, 4),
        (3071, 3071, 4),
        (3072, 3073, 8),
        (6000, 6000, 8),
    ],
)
def test_a_jpeg_is_scaled_where_1_5_times_the_size_is_left(width: int, height: int, divisor: int) -> None:
    data = encoded(Image.new("L", (width, height)), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert images._shrink(image, 256) == divisor  # pyright: ignore[reportPrivateUsage]
        assert image.size == (-(-width // divisor), -(-height // divisor))


def test_a_jpeg_that_is_not_scaled_is_decoded_as_ever() -> None:
    data = encoded(photograph(0, 683, 512), "JPEG", quality=90)
    assert np.array_equal(images.decode(data, 256), in_full(data, 256))


@pytest.mark.parametrize("along", [None, 0.0, 0.7, 1 - 2**-53])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(805, 601), (601, 805)])
def test_a_scaled_jpeg_of_odd_size_is_turned_to_the_same_place(
    width: int, height: int, orientation: int, along: float | None
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(0, width, height), "JPEG", quality=95, exif=exif)
    assert psnr_db(images.decode(data, 48, along=along), in_full(data, 48, along)) >= 40


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_scaled_too(mode: str) -> None:
    data = encoded(photograph(0, 1024, 768).convert(mode), "JPEG", quality=90)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert psnr_db(images.decode(data, 256), in_full(data, 256)) >= 40


def test_the_first_picture_of_several_in_a_jpeg_is_scaled() -> None:
    data = encoded(photograph(0, 1024, 768), "MPO", quality=90, save_all=True, append_images=[photograph(1, 64, 64)])
    assert psnr_db(images.decode(data, 256), in_full(data, 256)) >= 40


def test_half_of_a_large_jpeg_is_refused() -> None:
    data = encoded(photograph(0, 1024, 768), "JPEG")
    with pytest.raises(ValueError, match="not a readable JPEG, PNG, WEBP image: "):
        images.decode(data[: len(data) // 2], 256)


# cut and mirrored ---------------------------------------------------------------------------------


EVERY_KIND: dict[str, bytes] = {
    "PNG": encoded(slopes(50, 73)),
    "PNG, upright": encoded(slopes(73, 50)),
    "WebP": encoded(slopes(50, 73), "WEBP"),
    "grey": encoded(slopes(50, 73)[..., 0]),
    "palette": encoded(Image.fromarray(slopes(50, 73)).quantize(16)),
}


@pytest.mark.parametrize("size", [16, 41, 50, 99])
@pytest.mark.parametrize("data", EVERY_KIND.values(), ids=EVERY_KIND.keys())
def test_the_centre_is_what_it_always_was(data: bytes, size: int) -> None:
    assert np.array_equal(images.decode(data, size), in_full(data, size))


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 80),
    fmt=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    orientation=st.integers(1, 8),
    along=st.none() | st.floats(0, 1, exclude_max=True),
    mirrored=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_size_becomes_the_square_asked_for(
    width: int, height: int, size: int, fmt: str, orientation: int, along: float | None, mirrored: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (width, height), (10, 200, 90)), fmt, exif=exif)
    decoded = images.decode(data, size, along=along, mirrored=mirrored)
    assert decoded.shape == (size, size, 3) and decoded.dtype == np.uint8
    assert distance(decoded, np.full_like(decoded, (10, 200, 90))) < 8  # nothing from outside of the picture


@pytest.mark.parametrize(("height", "width"), [(20, 33), (33, 20), (20, 20)])
def test_a_place_along_the_longer_side_is_cut(height: int, width: int) -> None:
    x = noise(height, width)
    places = max(height, width) - 20 + 1
    for place in range(places):
        top, left = (0, place) if width > height else (place, 0)
        for along in (place / places + 1e-9, (place + 1) / places - 1e-9):
            assert np.array_equal(images.decode(encoded(x), 20, along=along), x[top : top + 20, left : left + 20])


def test_the_last_draw_stays_inside() -> None:
    for width in (21, 1000, 65_535):
        x = np.zeros((20, width), dtype=np.uint8)
        x[:, -20:] = 200
        assert (images.decode(encoded(x), 20, along=1 - 2**-53) == 200).all()


@pytest.mark.parametrize("along", [None, 0.3])
@pytest.mark.parametrize("data", EVERY_KIND.values(), ids=EVERY_KIND.keys())
def test_mirrored_is_exactly_that(data: bytes, along: float | None) -> None:
    straight, mirrored = (images.decode(data, 24, along=along, mirrored=it) for it in (False, True))
    assert np.array_equal(mirrored, straight[:, ::-1]) and mirrored.flags["C_CONTIGUOUS"]
    assert not np.array_equal(mirrored, straight)


# pixels and what the autoencoder reads -------------------------------------------------------------


def test_to_unit_and_back_is_exact_for_every_value() -> None:
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = images.to_unit(x)
    assert unit.dtype == np.float32 and unit.shape == (1, 3, 16, 16)
    assert unit.min() == -1 and unit.max() == 1
    assert np.array_equal(images.to_pixels(unit), x)
    assert np.array_equal(images.to_pixels(torch.from_numpy(np.ascontiguousarray(unit))), x)


def test_to_unit_keeps_channels_and_places_apart() -> None:
    x = noise(4, 6)
    unit = images.to_unit(x)
    assert unit.shape == (3, 4, 6)
    assert unit[2, 1, 5] == np.float32(x[1, 5, 2]) / np.float32(127.5) - 1
    assert np.array_equal(images.to_pixels(unit), x)


def test_to_pixels_rounds_and_clips() -> None:
    unit = np.array([-7, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1 - 0.51 / 127.5, 1, 7], dtype=np.float32)
    pixels = images.to_pixels(unit.reshape(1, 1, -1).repeat(3, axis=0))
    assert pixels[0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_encode_png_is_lossless_and_repeats() -> None:
    x = noise(9, 9)
    assert images.encode_png(x) == images.encode_png(x)
    assert np.array_equal(images.decode(images.encode_png(x), 9), x)
