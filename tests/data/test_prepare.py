"""Prepared sets hold what they promise, repeat byte for byte, and are never written over by another."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import files
from pipeline.data import images
from pipeline.data.dataset import read_images
from pipeline.data.index import ShardSet
from pipeline.data.prepare import prepare_digits, prepare_folder, uneven_sizes
from pipeline.data.sources import DIGIT_NAMES, HELD_OUT_WORDINGS, WORDINGS
from pipeline.errors import UsageError

ARGUMENTS: dict[str, Any] = {"size": 8, "seed": 0, "validation_share": 0.2}


def digits(out: Path, **changes: Any) -> Path:
    prepare_digits(out, **ARGUMENTS | changes)
    return out


@pytest.fixture(scope="module")
def digit_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def captions_and_labels(folder: Path) -> list[tuple[str, int]]:
    shards = ShardSet(folder, open_shards=1)
    parts = [shards.read(shard, row)[1] for shard, count in enumerate(shards.counts) for row in range(count)]
    return [(part["txt"].decode(), int(part["cls"])) for part in parts]


@pytest.mark.parametrize(("name", "count", "num_shards"), [("train", 1437, 7), ("validation", 360, 3)])
def test_digits_are_all_there_in_uneven_shards(digit_sets: Path, name: str, count: int, num_shards: int) -> None:
    shards = ShardSet(digit_sets / name, open_shards=1)
    assert len(shards) == count and len(shards.counts) == num_shards
    assert len(set(shards.counts)) == num_shards and shards.counts == uneven_sizes(count, num_shards)
    said = files.read_json(digit_sets / name / "dataset.json")
    assert said["kind"] == "images" and said["num_samples"] == count
    assert said["made_by"] == {"prepare": "digits", **ARGUMENTS}
    assert files.read_json(digit_sets / name / "index" / "manifest.json")["source"] == said["made_by"]


def test_digits_keep_the_share_of_every_class(digit_sets: Path) -> None:
    whole = Counter(load_digits().target.tolist())
    for name, share in (("train", 1437 / 1797), ("validation", 360 / 1797)):
        counts = files.read_json(digit_sets / name / "dataset.json")["label_counts"]
        _, labels, _, _ = read_images(digit_sets / name, size=8, limit=2000)
        assert counts == {str(label): count for label, count in sorted(Counter(labels.tolist()).items())}
        assert all(abs(counts[str(label)] - whole[label] * share) <= 1 for label in range(10))


def test_every_digit_is_in_one_of_the_sets_once(digit_sets: Path) -> None:
    def multiset(x: NDArray[np.uint8], labels: NDArray[np.int64]) -> Counter[tuple[bytes, int]]:
        return Counter((image.tobytes(), int(label)) for image, label in zip(x, labels, strict=True))

    source: Any = load_digits()
    grey = np.rint(source.images * (255 / 16)).astype(np.uint8)
    found = sum(
        (multiset(*read_images(digit_sets / name, size=8, limit=2000)[:2]) for name in ("train", "validation")),
        Counter(),
    )
    assert found == multiset(np.stack([grey] * 3, axis=-1), source.target)


def test_digits_are_scaled(tmp_path: Path, digit_sets: Path) -> None:
    large, labels, _, _ = read_images(digits(tmp_path, size=16) / "validation", size=16, limit=360)
    small, labels_of_small, _, _ = read_images(digit_sets / "validation", size=8, limit=360)
    scaled = [Image.fromarray(x).resize((16, 16), Image.Resampling.BICUBIC) for x in small]
    assert np.array_equal(large, np.stack([np.asarray(image) for image in scaled]))
    assert np.array_equal(labels, labels_of_small)


def test_captions_name_the_digit(digit_sets: Path) -> None:
    for part, wordings in (("train", WORDINGS), ("validation", HELD_OUT_WORDINGS)):
        found = captions_and_labels(digit_sets / part)
        assert all(caption in {wording.format(DIGIT_NAMES[label]) for wording in wordings} for caption, label in found)
        assert {caption for caption, label in found if label == 3} == {wording.format("three") for wording in wordings}
    assert not set(WORDINGS) & set(HELD_OUT_WORDINGS)


def test_same_arguments_same_bytes(tmp_path: Path, digit_sets: Path) -> None:
    assert content(digits(tmp_path)) == content(digit_sets)


def test_another_seed_splits_anew(tmp_path: Path, digit_sets: Path) -> None:
    other = digits(tmp_path, seed=1)
    for name in ("train", "validation"):
        manifests = [files.read_json(folder / name / "index" / "manifest.json") for folder in (digit_sets, other)]
        assert manifests[0]["fingerprint"] != manifests[1]["fingerprint"]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_call_does_nothing(digit_sets: Path) -> None:
    before = times(digit_sets)
    digits(digit_sets)
    assert times(digit_sets) == before


@pytest.mark.parametrize("change", [{"size": 16}, {"seed": 1}, {"validation_share": 0.3}], ids=str)
def test_other_arguments_are_refused(digit_sets: Path, change: dict[str, Any]) -> None:
    before = times(digit_sets)
    with pytest.raises(UsageError, match=r"train: holds a set made by .*, .* was asked for; choose another folder"):
        digits(digit_sets, **change)
    assert times(digit_sets) == before


def test_a_broken_off_call_is_taken_up(tmp_path: Path, digit_sets: Path) -> None:
    out = digits(tmp_path)
    (out / "train" / "dataset.json").unlink()
    (out / "train" / "000003.tar").write_bytes(b"half")
    digits(out)
    assert content(out) == content(digit_sets)


def test_another_validation_set_is_not_written_over(tmp_path: Path) -> None:
    out = digits(tmp_path, seed=1)
    (out / "train" / "dataset.json").unlink()
    with pytest.raises(UsageError, match="validation: holds a set made by"):
        digits(out)


def test_other_tars_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"train: holds mine\.tar, which does not belong to this set"):
        digits(tmp_path)
    assert content(tmp_path) == {"train/mine.tar": b"precious"}


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_a_share_too_small_for_ten_classes_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UsageError, match="1797 images"):
        digits(tmp_path, validation_share=share)


@pytest.mark.parametrize(("total", "num_shards"), [(1437, 7), (360, 3), (10, 1), (3, 2), (0, 3)])
def test_uneven_sizes_add_up(total: int, num_shards: int) -> None:
    sizes = uneven_sizes(total, num_shards)
    assert len(sizes) == num_shards and sum(sizes) == total and sizes == sorted(sizes) and min(sizes) >= 0


# A folder per class


def colour(value: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes named out of order, every format, a folder within a folder, and what is no image."""
    source = tmp_path / "pictures"
    for name, values in (("zebra", range(200, 206)), ("ant", range(10, 14)), ("bee", range(100, 105))):
        (source / name / "more").mkdir(parents=True)
        for i, value in enumerate(values):
            suffix = ("png", "jpg", "JPEG", "webp")[i % 4]
            colour(value, 8 + i, 8).save(source / name / ("more" if i == 1 else "") / f"{i}.{suffix}")
        (source / name / "notes.txt").write_text("not an image")
    return source


def folder_set(source: Path, out: Path, **changes: Any) -> Path:
    prepare_folder(source, out, **ARGUMENTS | changes)
    return out


def test_classes_are_numbered_by_name(tmp_path: Path, pictures: Path) -> None:
    out = folder_set(pictures, tmp_path / "out")
    seen: Counter[int] = Counter()
    for name, count in (("train", 12), ("validation", 3)):
        x, labels, _, _ = read_images(out / name, size=8, limit=100)
        assert len(labels) == count
        for image, label in zip(x, labels.tolist(), strict=True):
            assert abs(int(image.mean()) - (12, 102, 203)[label]) <= 5
        seen.update(labels.tolist())
        assert all(caption == ("ant", "bee", "zebra")[label] for caption, label in captions_and_labels(out / name))
        assert files.read_json(out / name / "dataset.json")["made_by"]["classes"] == ["ant", "bee", "zebra"]
    assert seen == {0: 4, 1: 5, 2: 6}


def test_same_pictures_same_bytes(tmp_path: Path, pictures: Path) -> None:
    assert content(folder_set(pictures, tmp_path / "a")) == content(folder_set(pictures, tmp_path / "b"))


def test_prepared_twice_is_prepared_once(tmp_path: Path, pictures: Path) -> None:
    out = folder_set(pictures, tmp_path / "out")
    before = times(out)
    folder_set(pictures, out)
    assert times(out) == before


def test_changed_pictures_are_refused(tmp_path: Path, pictures: Path) -> None:
    out = folder_set(pictures, tmp_path / "out")
    colour(90).save(pictures / "bee" / "new.png")
    with pytest.raises(UsageError, match="train: holds a set made by"):
        folder_set(pictures, out)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff"], ids=["empty", "gif", "torn"])
def test_an_unreadable_image_is_named(tmp_path: Path, pictures: Path, data: bytes) -> None:
    bad = pictures / "bee" / "more" / "bad.png"
    bad.write_bytes(data)
    with pytest.raises(UsageError) as told:
        folder_set(pictures, tmp_path / "out")
    assert str(told.value).startswith(f"{bad}: not a readable JPEG, PNG, WEBP image: ")
    sets = [tmp_path / "out" / name / "dataset.json" for name in ("train", "validation")]
    assert not all(path.exists() and files.read_json(path)["complete"] for path in sets)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    colour(1).save(tmp_path / "a.png")
    colour(2).save(tmp_path / "b.png")
    with pytest.raises(UsageError, match="0 folders with 0 images came; a folder per class was wanted"):
        folder_set(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    (tmp_path / "pictures" / "class" / "a.gif").write_bytes(b"GIF89a")
    told = r"1 folders with 0 images came; .*; passed over: 1 \.gif \(such as class/a\.gif\); JPEG, PNG and WebP"
    with pytest.raises(UsageError, match=told):
        folder_set(tmp_path / "pictures", tmp_path / "out")


def test_what_is_passed_over_is_told_by_ending(tmp_path: Path, pictures: Path) -> None:
    for name in ("ant/a.gif", "ant/more/b.GIF", "bee/c.tiff", "bee/README", "list.csv", "top.png", "top.JPG"):
        (pictures / name).write_bytes(b"not read")
    (pictures / "bee" / "linked").symlink_to(pictures / "ant")
    (pictures / "cat").mkdir()
    told = prepare_folder(pictures, tmp_path / "out", **ARGUMENTS)
    assert told == (
        "passed over: 1 .csv (such as list.csv), 2 .gif (such as ant/a.gif), 1 .jpg in no class folder (such as "
        "top.JPG), 1 .png in no class folder (such as top.png), 1 .tiff (such as bee/c.tiff), 3 .txt (such as "
        "ant/notes.txt), 1 linked folder (such as bee/linked), 1 without an ending (such as bee/README); JPEG, PNG "
        "and WebP in class folders are read; classes without an image: 1 (such as cat)"
    )
    assert prepare_folder(pictures, tmp_path / "out", **ARGUMENTS) == told  # also when all is there already


def test_hidden_names_are_not_looked_at(tmp_path: Path, pictures: Path) -> None:
    for path in list(pictures.rglob("notes.txt")):
        path.unlink()
    before = content(folder_set(pictures, tmp_path / "before"))
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "ant/.DS_Store",
        "ant/._0.png",
        "ant/.thumbs/a.png",
        ".git/a.png",
    ):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"")
    assert prepare_folder(pictures, tmp_path / "after", **ARGUMENTS) == ""
    assert content(tmp_path / "after") == before


def test_an_image_that_is_a_broken_link_is_named(tmp_path: Path, pictures: Path) -> None:
    (pictures / "ant" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UsageError, match=rf"^{pictures}/ant/gone\.png: No such file or directory$"):
        folder_set(pictures, tmp_path / "out")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: 0 folders with 0 images came"):
        folder_set(tmp_path / "none", tmp_path / "out")


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"15 images, 0\.99 of them for validation: "):
        folder_set(pictures, tmp_path / "out", validation_share=0.99)


def test_large_images_are_cut_to_the_centre(tmp_path: Path) -> None:
    x = np.zeros((16, 48, 3), dtype=np.uint8)
    x[:, 16:32] = 255
    for i in range(2):
        (tmp_path / "pictures" / "bar").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / "bar" / f"{i}.png").write_bytes(images.encode_png(x))
    out = folder_set(tmp_path / "pictures", tmp_path / "out", validation_share=0.5)
    assert read_images(out / "train", size=8, limit=1)[0].min() > 200
