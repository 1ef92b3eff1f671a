"""Tables give image–text and image–label pairs as they say, and a row that can't be used is named."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import files
from pipeline.data.dataset import image_part
from pipeline.data.index import ShardSet
from pipeline.data.prepare import prepare_table
from pipeline.data.tables import Columns
from pipeline.errors import UsageError

ARGUMENTS: dict[str, Any] = {"size": 8, "seed": 0, "validation_share": 0.25}
CAPTIONS = ['a "quoted", word', "grüße aus Köln", "three\nlines\nof it", "", "写真", "a; b", "it's", "plain"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images; image i is 10·i + 5 bright all over."""
    root = tmp_path / "photos"
    (root / "möre").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.full((8, 9, 3), 10 * i + 5, dtype=np.uint8)).save(root / name_of(i))
    return root


def name_of(i: int) -> str:
    return f"möre/{i}.png" if i % 2 else f"{i}.png"


def write_csv(path: Path, rows: list[dict[str, Any]], newline: str = "\r\n") -> Path:
    """Quoted by hand, as RFC 4180 says."""

    def quoted(value: Any) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(map(quoted, row.values())) for row in rows)]
    path.write_text(newline.join(lines) + newline, encoding="utf-8", newline="")
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


WRITERS = [("csv", write_csv), ("jsonl", write_jsonl)]
both = pytest.mark.parametrize(("ending", "write"), WRITERS, ids=["csv", "jsonl"])


def rows_with(**columns: list[Any]) -> list[dict[str, Any]]:
    names = ["path", *columns]
    return [dict(zip(names, row, strict=True)) for row in zip(map(name_of, range(8)), *columns.values(), strict=True)]


def prepared(table: Path, root: Path, out: Path, **changes: Any) -> dict[int, dict[str, bytes]]:
    """Number of the image → its parts, over train and validation."""
    prepare_table(table, root, out, **ARGUMENTS | changes)
    found: dict[int, dict[str, bytes]] = {}
    for name, count in (("train", 6), ("validation", 2)):
        shards = ShardSet(out / name, open_shards=1)
        assert len(shards) == count
        for row in range(count):
            _, parts = shards.read(0, row)
            with Image.open(_as_file(out, image_part(parts))) as image:
                found[round((np.asarray(image).mean() - 5) / 10)] = parts
    return found


def _as_file(out: Path, data: bytes) -> Path:
    path = out / "one.image"
    path.write_bytes(data)
    return path


@both
def test_captions_and_integers_arrive(tmp_path: Path, photos: Path, ending: str, write: Any) -> None:
    labels = [3, 0, 3, 1, 2, 0, 0, 12]
    table = write(tmp_path / f"table.{ending}", rows_with(caption=CAPTIONS, label=labels))
    found = prepared(table, photos, tmp_path / "out")
    assert {i: parts["txt"].decode() for i, parts in found.items()} == dict(enumerate(CAPTIONS))
    assert {i: int(parts["cls"]) for i, parts in found.items()} == dict(enumerate(labels))
    said = [files.read_json(tmp_path / "out" / name / "dataset.json") for name in ("train", "validation")]
    assert sum(sum(of_set["label_counts"].values()) for of_set in said) == 8
    assert all(of_set["complete"] and "classes" not in of_set["made_by"] for of_set in said)


@both
def test_names_are_numbered_by_name(tmp_path: Path, photos: Path, ending: str, write: Any) -> None:
    names = ["zebra", "ant", "zebra", "Ökonom", "ant", "bee", "bee", "zebra"]
    table = write(tmp_path / f"table.{ending}", rows_with(label=names))
    found = prepared(table, photos, tmp_path / "out")
    ordered = ["ant", "bee", "zebra", "Ökonom"]
    assert {i: ordered[int(parts["cls"])] for i, parts in found.items()} == dict(enumerate(names))
    assert all(set(parts) == {"png", "cls"} for parts in found.values())
    assert files.read_json(tmp_path / "out" / "train" / "dataset.json")["made_by"]["classes"] == ordered


@both
def test_captions_alone_make_no_labels(tmp_path: Path, photos: Path, ending: str, write: Any) -> None:
    table = write(tmp_path / f"table.{ending}", rows_with(caption=CAPTIONS))
    found = prepared(table, photos, tmp_path / "out")
    assert all(set(parts) == {"png", "txt"} for parts in found.values())
    said = files.read_json(tmp_path / "out" / "train" / "dataset.json")
    assert (said["num_samples"], said["label_counts"]) == (6, {})


def test_csv_and_jsonl_give_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    tars: list[bytes] = []
    for ending, write in WRITERS:
        table = write(tmp_path / f"table.{ending}", rows_with(caption=CAPTIONS, label=list(range(8))))
        prepare_table(table, photos, tmp_path / ending, **ARGUMENTS)
        tars.append((tmp_path / ending / "train" / "000000.tar").read_bytes())
    assert tars[0] == tars[1]


def test_a_byte_order_mark_other_columns_and_absolute_paths_are_read(tmp_path: Path, photos: Path) -> None:
    table = tmp_path / "table.csv"
    lines = ["path,,caption", *(f"{photos / name_of(i)},{i},caption {i}" for i in range(8))]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    found = prepared(table, tmp_path / "nowhere", tmp_path / "out")
    assert {i: parts["txt"].decode() for i, parts in found.items()} == {i: f"caption {i}" for i in range(8)}


def test_columns_may_have_other_names(tmp_path: Path, photos: Path) -> None:
    rows = [{"file_name": name_of(i), "text": f"caption {i}", "label": "not asked for"} for i in range(8)]
    table = write_jsonl(tmp_path / "metadata.jsonl", rows)
    found = prepared(table, photos, tmp_path / "out", columns=Columns("file_name", "text", "kind"))
    assert all(set(parts) == {"png", "txt"} for parts in found.values())


def test_jpegs_are_written_when_asked_for(tmp_path: Path, photos: Path) -> None:
    table = write_csv(tmp_path / "table.csv", rows_with(caption=CAPTIONS))
    found = prepared(table, photos, tmp_path / "out", image_format="jpg")
    assert sorted(found) == list(range(8))
    for parts in found.values():
        assert set(parts) == {"jpg", "txt"}
        with Image.open(_as_file(tmp_path, parts["jpg"])) as image:
            assert image.format == "JPEG"
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4
    with pytest.raises(UsageError, match="train: holds a set made by"):
        prepare_table(table, photos, tmp_path / "out", **ARGUMENTS)


# What can't be used


def refused(tmp_path: Path, table: Path, root: Path, **changes: Any) -> str:
    with pytest.raises(UsageError) as told:
        prepare_table(table, root, tmp_path / "out", **ARGUMENTS | changes)
    assert "\n" not in str(told.value)
    said = [path for path in (tmp_path / "out").rglob("dataset.json") if files.read_json(path)["complete"]]
    assert len(said) < 2
    return str(told.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "gone.png"}, "gone.png: no such image file"),
        ({"path": "."}, "photos: no such image file"),
        ({"path": ""}, "path '' came, the path of an image was wanted"),
        ({"path": "a\0b"}, "path 'a\\x00b' came, the path of an image was wanted"),
        ({"label": "-1"}, "label -1 came, an integer of 0 or more, or a name, was wanted"),
        ({"label": "1.0"}, "label '1.0' came, an integer of 0 or more, or a name, was wanted"),
        ({"label": ""}, "label '' came, an integer of 0 or more, or a name, was wanted"),
        ({"label": "cat"}, "label 'cat' came, row 1 has 0: integers or names were wanted, not both"),
    ],
    ids=str,
)
@both
def test_a_bad_row_is_named(
    tmp_path: Path, photos: Path, ending: str, write: Any, change: dict[str, Any], told: str
) -> None:
    rows = rows_with(caption=CAPTIONS, label=list(range(8)))
    rows[4] |= change
    table = write(tmp_path / f"table.{ending}", rows)
    message = refused(tmp_path, table, photos)
    assert message.startswith(f"{table}: row 5: ") and message.endswith(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"label": True}, {"label": 1.0}, {"label": None}, {"caption": 3}, {"path": 1}])
def test_a_value_of_another_type_is_named(tmp_path: Path, photos: Path, change: dict[str, Any]) -> None:
    rows = rows_with(caption=CAPTIONS, label=list(range(8)))
    rows[4] |= change
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    ((column, value),) = change.items()
    assert refused(tmp_path, table, photos).startswith(f"{table}: row 5: {column} {value!r} came, ")


@pytest.mark.parametrize("workers", [0, 2])
@both
def test_what_is_no_image_is_named(tmp_path: Path, photos: Path, ending: str, write: Any, workers: int) -> None:
    (photos / name_of(6)).write_bytes(b"GIF89a")
    table = write(tmp_path / f"table.{ending}", rows_with(caption=CAPTIONS))
    message = refused(tmp_path, table, photos, workers=workers)
    assert message.startswith(f"{table}: row 7: {photos / name_of(6)}: not a readable JPEG, PNG, WEBP image: ")


def test_a_column_that_comes_later_is_named(tmp_path: Path, photos: Path) -> None:
    rows = rows_with(caption=CAPTIONS)
    rows[2]["label"] = 1
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    assert refused(tmp_path, table, photos) == f"{table}: row 3: label came, which the first row does not have"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,caption\na,b\n", "no column 'path'; its columns: file, caption"),
        ("path,text\na,b\n", "no column 'caption' and no 'label'; its columns: path, text"),
        ("path,caption\na,b\nc,d,e\n", "row 2: 3 fields came, 2 were wanted"),
        ("path,caption\na,b\nc\n", "row 2: 1 fields came, 2 were wanted"),
        ('path,caption\na,b\nc,"d\n', "row 2: not CSV: unexpected end of data"),
        ("path,caption\na,b\n", "1 rows came, at least 2 were wanted"),
        ("", "0 rows came, at least 2 were wanted"),
    ],
)
def test_a_bad_csv_is_told(tmp_path: Path, text: str, told: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    assert refused(tmp_path, table, tmp_path) == f"{table}: {told}"


@pytest.mark.parametrize(
    ("line", "told"), [("{", "row 3: not JSON: "), ("[1]", "row 3: list came, a JSON object was wanted")]
)
def test_a_bad_line_of_json_is_told(tmp_path: Path, line: str, told: str) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(f'{{"path": "a", "label": 1}}\n\n{line}\n')
    assert refused(tmp_path, table, tmp_path).startswith(f"{table}: {told}")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("table.csv", None, "not readable ([Errno 2] No such file or directory"),
        ("table.csv", b"path,caption\na,\xff\xfe\n", "not readable ('utf-8' codec can't decode byte 0xff"),
        ("table.xlsx", b"PK", ".xlsx came, .csv, .jsonl or .parquet was wanted"),
        ("table", b"", "no ending came, .csv, .jsonl or .parquet was wanted"),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, name: str, data: bytes | None, told: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert refused(tmp_path, tmp_path / name, tmp_path).startswith(f"{tmp_path / name}: {told}")


# Parquet


def test_parquet_without_pyarrow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    table = tmp_path / "table.parquet"
    assert refused(tmp_path, table, tmp_path).startswith(f"{table}: pyarrow is not installed, which reads Parquet; ")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow, an extra, is not installed")
def test_parquet_is_read(tmp_path: Path, photos: Path) -> None:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    table = tmp_path / "table.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows_with(caption=CAPTIONS, label=list(range(8)))), table)
    found = prepared(table, photos, tmp_path / "out")
    assert {i: (parts["txt"].decode(), int(parts["cls"])) for i, parts in found.items()} == {
        i: (caption, i) for i, caption in enumerate(CAPTIONS)
    }
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"torn\.parquet: not readable Parquet \("):
        prepare_table(torn, photos, tmp_path / "none", **ARGUMENTS)
