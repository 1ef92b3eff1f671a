"""Moments survive the disk as fp16 or are refused; latents of another VAE, size, view or source are refused."""

import io
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import files
from pipeline.data import latents
from pipeline.data.index import build_index
from pipeline.data.latents import (
    FORMAT,
    PART,
    Origin,
    check_same_origin,
    describe,
    moments_from_bytes,
    moments_to_bytes,
)
from pipeline.errors import UsageError

ORIGIN = Origin(
    encoder_sha256="a" * 64,
    image_size=32,
    crop="centre",
    flip=False,
    precision="fp32",
    batch_images=64,
    source_fingerprint="f" * 64,
)
SAID: dict[str, Any] = {
    "format": FORMAT,
    "kind": "latents",
    "complete": True,
    "fingerprint": "of the index",
    "origin": asdict(ORIGIN),
    "scale": 0.5,
}


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def open_latents(folder: Path, **other: Any) -> dict[str, Any]:
    fitting = {"encoder_sha256": "a" * 64, "image_size": 32, "crop": "centre", "flip": False, "encode_crops": 1}
    return latents.open_latents(folder, **(fitting | other))


def test_moments_survive_as_fp16() -> None:
    moments = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32) * 100
    read = moments_from_bytes(moments_to_bytes(moments))
    assert read.dtype == np.float16 and np.array_equal(read, moments.astype(np.float16))
    assert np.array_equal(moments_from_bytes(moments_to_bytes(read)), read)


def test_extremes_of_fp16_survive() -> None:
    extremes = np.array([65504, -65504, 2**-24, -(2**-24), 0, -0.0], dtype=np.float32).reshape(6, 1, 1)
    assert np.array_equal(moments_from_bytes(moments_to_bytes(extremes)), extremes)


def test_memory_layout_does_not_matter() -> None:
    moments = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float16).transpose(2, 1, 0)
    assert np.array_equal(moments_from_bytes(moments_to_bytes(moments)), moments)
    assert np.array_equal(moments_from_bytes(npy(moments)), moments)


@pytest.mark.parametrize("value", [65520.0, -1e9, np.inf, -np.inf, np.nan])
def test_what_fp16_does_not_hold_is_refused(value: float) -> None:
    moments = np.zeros((4, 2, 2), dtype=np.float32)
    moments[1, 1, 0] = value
    with pytest.raises(ValueError, match="not finite in fp16"):
        moments_to_bytes(moments)


class Evil:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hidden = np.empty((2, 1, 1), dtype=object)
    hidden[0, 0, 0] = Evil(trace)
    buffer = io.BytesIO()
    np.savez(buffer, moments=hidden)
    for data in (npy(hidden), pickle.dumps(Evil(trace)), pickle.dumps(Evil(trace), protocol=0), buffer.getvalue()):
        with pytest.raises(ValueError):
            moments_from_bytes(data)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # it would have shown


WHOLE = moments_to_bytes(np.ones((4, 2, 2)))
WRONG = {
    "fp32": npy(np.zeros((4, 2, 2), dtype=np.float32)),
    "integers": npy(np.zeros((4, 2, 2), dtype=np.int16)),
    "big-endian": npy(np.zeros((4, 2, 2), dtype=">f2")),
    "two axes": npy(np.zeros((4, 2), dtype=np.float16)),
    "a batch": npy(np.zeros((1, 4, 2, 2), dtype=np.float16)),
    "a number": npy(np.float16(0)),
    "odd channels": npy(np.zeros((3, 2, 2), dtype=np.float16)),
    "infinity": npy(np.full((4, 2, 2), np.inf, dtype=np.float16)),
    "not a number": npy(np.full((4, 2, 2), np.nan, dtype=np.float16)),
    "nothing": b"",
    "text": b"latents",
    "half": WHOLE[:-8],
    "half a header": WHOLE[:40],
    "a huge shape": WHOLE.replace(b"(4, 2, 2), }" + b" " * 10, b"(4, 99999999999, 2), }"),
    "a shape of code": WHOLE.replace(b"(4, 2, 2)", b"exit(1)  "),
    "an archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        moments_from_bytes(data)


def test_the_wanted_and_the_given_are_named() -> None:
    with pytest.raises(ValueError, match=r"fp16 \[2C,h,w\] was wanted, float32 \[4, 2\] came"):
        moments_from_bytes(npy(np.zeros((4, 2), dtype=np.float32)))


@pytest.fixture
def folder(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    """A set of one shard, indexed, that SAID describes."""
    write_tar(tmp_path / "set" / "0.tar", [{"__key__": "a", PART: npy(np.zeros((2, 1, 1), np.float16))}])
    build_index(tmp_path / "set")
    manifest = tmp_path / "set" / "index" / "manifest.json"
    files.write_json(manifest, files.read_json(manifest) | {"fingerprint": SAID["fingerprint"]})
    files.write_json(tmp_path / "set" / "dataset.json", SAID)
    return tmp_path / "set"


def test_a_fitting_set_opens(folder: Path) -> None:
    assert open_latents(folder) == SAID


def test_other_shards_than_encode_wrote_are_refused(folder: Path) -> None:
    manifest = folder / "index" / "manifest.json"
    files.write_json(manifest, files.read_json(manifest) | {"fingerprint": "another"})
    with pytest.raises(UsageError, match="not those that encode wrote"):
        open_latents(folder)


def test_another_vae_is_refused(folder: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"made by the encoder aaaaaaaaaaaa, vae\.path names an autoencoder with the encoder bbbbbbbbbbbb",
    ):
        open_latents(folder, encoder_sha256="b" * 64)


def test_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"made from 32 px images, data\.image_size is 64"):
        open_latents(folder, image_size=64)


VIEWS = {
    "centre": {},
    "one drawn square": {"crop": "random", "encode_crops": 1},
    "mirrored": {"flip": True},
    "squares": {"crop": "random", "encode_crops": 3},
    "other squares": {"crop": "random", "encode_crops": 2},
    "all": {"crop": "random", "encode_crops": 3, "flip": True},
}


@pytest.mark.parametrize("written", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("asked", VIEWS.values(), ids=VIEWS.keys())
def test_other_views_are_refused(folder: Path, written: dict[str, Any], asked: dict[str, Any]) -> None:
    num_crops, flip = written.get("encode_crops", 1), written.get("flip", False)
    origin = replace(ORIGIN, crop=latents.crop_name(num_crops), flip=flip)
    files.write_json(folder / "dataset.json", SAID | {"origin": asdict(origin)})
    if (asked.get("encode_crops", 1), asked.get("flip", False)) == (num_crops, flip):
        open_latents(folder, **asked)
    else:
        with pytest.raises(UsageError, match=rf"these latents are of squares cut {origin.crop!r}.*data\.flip ask for"):
            open_latents(folder, **asked)


def test_the_first_view_is_the_contract() -> None:
    assert latents.view_parts(1, False) == [latents.PART] == ["moments.npy"]
    assert latents.view_parts(2, True) == [
        "moments.npy",
        "moments.flip.npy",
        "moments.crop1.npy",
        "moments.crop1.flip.npy",
    ]
    assert len(set(latents.view_parts(11, True))) == 22


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("num_crops", [1, 2, 3, 7])
def test_draws_choose_every_view_as_often(num_crops: int, flip: bool) -> None:
    grid = [(i + 0.5) / 84 for i in range(84)]
    drawn = [latents.view_of(u, v, num_crops=num_crops, flip=flip) for u in grid for v in grid]
    views = latents.view_parts(num_crops, flip)
    assert {part: drawn.count(part) for part in views} == dict.fromkeys(views, 84 * 84 // len(views))
    last = np.nextafter(1.0, 0.0)
    assert latents.view_of(last, last, num_crops=num_crops, flip=flip) == latents.view_part(num_crops - 1, False)


def test_squares_are_evenly_spaced() -> None:
    assert latents.places(1) == [None]
    assert latents.places(2) == [0.25, 0.75]
    assert latents.places(5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_text_survives_as_fp16() -> None:
    embedding = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    read = latents.text_from_bytes(latents.text_to_bytes(embedding))
    assert read.dtype == np.float16 and np.array_equal(read, embedding.astype(np.float16))
    for wrong in (np.full((7, 5), 1e9), np.full((7, 5), np.nan)):
        with pytest.raises(ValueError, match="the caption's embedding is not finite in fp16"):
            latents.text_to_bytes(wrong)
    for data in (npy(np.zeros((7, 5), dtype=np.float32)), WHOLE, b"", npy(np.full((7, 5), np.inf, dtype=np.float16))):
        with pytest.raises(ValueError):
            latents.text_from_bytes(data)


def described(mean: float, deviation: float, count: int, source: str) -> dict[str, Any]:
    """A set whose latents of one channel are mean ± deviation, half of each."""
    statistics = {
        "count": count,
        "sum_z": [mean * count],
        "sum_z_squared": [(mean**2 + deviation**2) * count],
    }
    origin = asdict(replace(ORIGIN, source_fingerprint=source))
    return {
        "scale": 1 / deviation,
        "shift": 0.0,
        "origin": origin,
        "num_samples": count,
        "label_counts": {"2": count},
        "statistics": statistics,
    }


def test_one_set_keeps_its_own_scale() -> None:
    one = described(0.3, 1 / 3, 10, "one")
    merged = latents.merge_descriptions([one], (1.0,))
    assert merged == {name: value for name, value in one.items() if name != "statistics"}


def test_mixed_sets_have_one_scale() -> None:
    """A mixture's variance: the mean of the variances, and the variance of the means."""
    merged = latents.merge_descriptions([described(1.0, 2.0, 10, "one"), described(-3.0, 1.0, 90, "two")], (3.0, 1.0))
    mean = 0.75 * 1 + 0.25 * -3
    variance = 0.75 * (4 + (1 - mean) ** 2) + 0.25 * (1 + (-3 - mean) ** 2)
    assert merged["scale"] == pytest.approx(variance**-0.5, rel=1e-12) and merged["shift"] == 0
    assert (merged["num_samples"], merged["label_counts"]) == (100, {"2": 100})
    assert merged["origin"]["encoder_sha256"] == ORIGIN.encoder_sha256
    assert merged["origin"]["source_fingerprint"] not in ("one", "two")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"complete": False}, "encode did not finish here; run the same encode command again"),
        ({"complete": None}, "encode did not finish here"),
        ({"kind": "images"}, f"'images' of format {FORMAT} came, latents of format {FORMAT} wanted"),
        ({"format": FORMAT + 1}, f"'latents' of format {FORMAT + 1} came"),
    ],
)
def test_an_unfinished_or_other_set_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    files.write_json(folder / "dataset.json", SAID | change)
    with pytest.raises(UsageError) as told:
        open_latents(folder)
    assert str(told.value).startswith(f"{folder}: ") and said in str(told.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: no such folder of latents; run encode with this config first"):
        open_latents(tmp_path / "none")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7"])
def test_a_set_that_says_nothing_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    for ask in (describe, open_latents):
        with pytest.raises(UsageError, match=r"no readable dataset\.json"):
            ask(tmp_path)


def test_the_same_origin_goes_on(folder: Path) -> None:
    check_same_origin(folder, describe(folder), ORIGIN)


OTHER: dict[str, Any] = {
    "encoder_sha256": "b" * 64,
    "image_size": 64,
    "crop": "random",
    "flip": True,
    "precision": "bf16",
    "batch_images": 32,
    "source_fingerprint": "0" * 64,
    "text_encoder_sha256": "c" * 64,
    "tile_pixels": 16,
}


@pytest.mark.parametrize(("field", "value"), OTHER.items(), ids=OTHER.keys())
def test_each_other_origin_is_named(folder: Path, field: str, value: Any) -> None:
    with pytest.raises(UsageError) as told:
        check_same_origin(folder, describe(folder), replace(ORIGIN, **{field: value}))
    assert f"({field} was {getattr(ORIGIN, field)!r}, now {value!r})" in str(told.value)


def test_another_kind_of_set_is_not_written_over(folder: Path) -> None:
    files.write_json(folder / "dataset.json", {"kind": "images", "format": 1})
    with pytest.raises(UsageError, match="holds something else"):
        check_same_origin(folder, describe(folder), ORIGIN)
