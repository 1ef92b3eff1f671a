"""Moments survive the disk as fp16 or are refused; a latent set made for another VAE, size or source is refused."""

import io
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import files
from pipeline.data import latents
from pipeline.data.latents import FORMAT, Origin, check_same_origin, describe, moments_from_bytes, moments_to_bytes
from pipeline.errors import UsageError

ORIGIN = Origin(
    vae_sha256="a" * 64,
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


def open_latents(folder: Path, vae: str = "a" * 64, size: int = 32) -> dict[str, Any]:
    return latents.open_latents(folder, vae, size)


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
def folder(tmp_path: Path) -> Path:
    files.write_json(tmp_path / "set" / "dataset.json", SAID)
    files.write_json(tmp_path / "set" / "index" / "manifest.json", {"fingerprint": SAID["fingerprint"]})
    return tmp_path / "set"


def test_a_fitting_set_opens(folder: Path) -> None:
    assert open_latents(folder) == SAID


def test_other_shards_than_encode_wrote_are_refused(folder: Path) -> None:
    files.write_json(folder / "index" / "manifest.json", {"fingerprint": "another"})
    with pytest.raises(UsageError, match="not those that encode wrote"):
        open_latents(folder)


def test_another_vae_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"made by the VAE aaaaaaaaaaaa, vae\.path names the VAE bbbbbbbbbbbb"):
        open_latents(folder, vae="b" * 64)


def test_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"made from 32 px images, data\.image_size is 64"):
        open_latents(folder, size=64)


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
    "vae_sha256": "b" * 64,
    "image_size": 64,
    "crop": "random",
    "flip": True,
    "precision": "bf16",
    "batch_images": 32,
    "source_fingerprint": "0" * 64,
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
