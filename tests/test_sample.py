"""`sample`: what is asked for, single files that say how they were drawn, any number of ranks, kills, one picture."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from small_pipe import small_pipe, small_text_pipe
from world import World, small_config

from pipeline import sample, sampler
from pipeline.image_files import slug
from pipeline.metrics.pictures import labelled_grid

PASSPORT = {"checkpoint": "step-000000008", "manifest_sha256": "12ab", "ema": "decay-0.9"}
NAMES = ["cat", "dog", "House, Wooden"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of untrained networks: `classes`, `text`, `both`."""
    root = tmp_path_factory.mktemp("exports")
    pipe = small_pipe()
    pipe.register_to_config(class_names=NAMES)
    pipe.save_pretrained(root / "classes")
    (root / "classes" / "training.json").write_text(json.dumps(PASSPORT))
    small_text_pipe(root / "text_encoder").save_pretrained(root / "text")
    small_text_pipe(root / "other_text_encoder", names=["cat", "dog", "House, Wooden"]).save_pretrained(root / "both")
    return root


@pytest.fixture
def here(exports: Path, tmp_path: Path) -> World:
    """A config and its export: all that sample reads."""
    values = small_config(tmp_path)
    values["evaluation"]["batch_images"] = 4
    here = World(tmp_path)
    here.config.write_text(yaml.safe_dump(values))
    here.run_dir.mkdir()
    (here.run_dir / "export").symlink_to(exports / "classes")
    return here


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def said(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["sample"])  # pyright: ignore[reportAttributeAccessIssue]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def ok(here: World, *words: str | Path) -> None:
    """Run sample in this process, well."""
    assert sample.main([str(here.config), *map(str, words)]) == 0


# one picture --------------------------------------------------------------------------------------


def test_the_grid_is_the_samplers_own_images_and_says_so(here: World, exports: Path) -> None:
    ok(here, "--classes", "dog,0", "--columns", "3", "--guidance", "4", "--seed", "1")
    grid = here.run_dir / "samples" / "grid.png"
    pipe = sampler.open_export(exports / "classes", "cpu")
    drawn = sampler.draw(
        pipe,
        [sampler.Asked(label) for label in (1, 1, 1, 0, 0, 0)],
        range(6),
        seed=1,
        guidance_scale=4.0,
        num_inference_steps=2,
        batch_images=4,
    )
    wanted = labelled_grid([("dog", list(drawn[:3])), ("cat", list(drawn[3:]))], scale=2)
    assert np.array_equal(pixels(grid), np.asarray(wanted))
    told = said(grid)
    assert (told["columns"], told["shared"]["guidance"], told["shared"]["export"]) == (3, 4.0, PASSPORT)
    assert [one["class"] for one in told["images"]] == ["dog"] * 3 + ["cat"] * 3
    assert [one["seed"] for one in told["images"]] == sampler.sample_seeds(1, range(6))
    assert [path.name for path in grid.parent.iterdir()] == ["grid.png"]


def test_a_grid_is_of_every_class_by_default_and_of_prompts_too(here: World, exports: Path, tmp_path: Path) -> None:
    ok(here, "--count", "2")
    assert [one["class"] for one in said(here.run_dir / "samples" / "grid.png")["images"]][::2] == NAMES
    out, long = tmp_path / "elsewhere" / "some.png", "two wooden houses beside a cat, and a dog, and a digit"
    ok(here, "--export", exports / "text", "--prompts", "a cat", long, "--count", "1", "--out", out)
    told = said(out)
    assert [one["prompt"] for one in told["images"]] == ["a cat", long]
    assert told["shared"]["class"] is None and set(told["shared"]["export"]) == {"unet_sha256"}


def test_a_grid_that_was_begun_for_another_command_begins_anew(here: World) -> None:
    begun = here.run_dir / "samples" / ".grid.png.images"
    ok(here, "--files", begun, "--count", "2")
    ok(here, "--count", "1")
    assert not begun.exists()
    assert len(said(here.run_dir / "samples" / "grid.png")["images"]) == 3


# single files -------------------------------------------------------------------------------------


def test_a_file_says_how_to_draw_it_again(here: World, exports: Path, tmp_path: Path) -> None:
    """In plain diffusers, with what the file says alone."""
    lines = [
        {"class": "House, Wooden", "guidance": 3, "negative_class": 0},
        {"class": 1, "seed": 5, "guidance": 1.5},
        {"class": "1", "negative_class": "cat", "guidance": 3.0, "seed": 2**62},
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out, how = tmp_path / "files", ["--guidance-rescale", "0.5", "--guidance-interval", "0", "0.8", "--steps", "3"]
    ok(here, "--from", asked, "--count", "2", *how, "--scheduler", "EulerDiscreteScheduler", "--files", out)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [
        "000000-house-wooden.png",
        "000001-house-wooden.png",
        *(f"00000{i}-dog.png" for i in range(2, 6)),
    ]
    seeds = sampler.sample_seeds(3, range(6))
    assert [row["seed"] for row in rows] == [seeds[0], seeds[1], 5, 6, 2**62, 2**62 + 1]
    assert rows[0] == {
        "file_name": "000000-house-wooden.png",
        "index": 0,
        "class": "House, Wooden",
        "prompt": None,
        "negative_class": "cat",
        "negative_prompt": None,
        "seed": seeds[0],
        "guidance": 3.0,
        "guidance_rescale": 0.5,
        "guidance_interval": [0.0, 0.8],
        "steps": 3,
        "scheduler": "EulerDiscreteScheduler",
        "eta": 0.0,
        "export": PASSPORT,
        "version": rows[0]["version"],
    }
    pipe: Any = DiffusionPipeline.from_pretrained(exports / "classes", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for row in rows:
        path = out / row["file_name"]
        assert {"file_name": path.name, **said(path)} == row
        again = pipe(
            row["class"],
            seeds=row["seed"],
            guidance_scale=row["guidance"],
            negative_label=row["negative_class"],
            guidance_rescale=row["guidance_rescale"],
            guidance_interval=row["guidance_interval"],
            num_inference_steps=row["steps"],
            eta=row["eta"],
        ).images[0]
        # A batch of another size rounds otherwise: one grey level at most.
        assert np.abs(np.asarray(again, dtype=np.int16) - pixels(path)).max() <= 1
    assert np.abs(pixels(out / rows[2]["file_name"]) - pixels(out / rows[3]["file_name"])).max() > 3


def test_prompts_and_their_negatives_are_drawn(here: World, exports: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.csv"
    asked.write_text('\ufeffprompt,negative_prompt,guidance,seed\r\n"a cat, süß",,,7\r\n"two\nhouses",a dog,2.5,\r\n')
    out = tmp_path / "files"
    ok(here, "--export", exports / "text", "--from", asked, "--files", out, "--eta", "1")
    names = ["000000-a-cat-su.png", "000001-two-houses.png"]
    assert sorted(files_of(out)) == [*names, "asked.json", "samples.jsonl"]
    first, second = (said(out / name) for name in names)
    assert (first["prompt"], first["negative_prompt"], first["seed"], first["guidance"]) == ("a cat, süß", None, 7, 2.0)
    assert (second["prompt"], second["negative_prompt"], second["guidance"]) == ("two\nhouses", "a dog", 2.5)
    pipe = sampler.open_export(exports / "text", "cpu")
    for row, name in zip((first, second), names, strict=True):
        again = pipe(
            prompt=row["prompt"],
            negative_prompt=row["negative_prompt"],
            seeds=row["seed"],
            guidance_scale=row["guidance"],
            num_inference_steps=2,
            eta=1.0,
        )
        assert np.abs(np.asarray(again.images[0], dtype=np.int16) - pixels(out / name)).max() <= 1  # pyright: ignore


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--classes", "cat,2", "--prompts", "a", "b"], [("cat", "a"), ("House, Wooden", "b")]),
        (["--classes", "1", "--prompts", "a", "b"], [("dog", "a"), ("dog", "b")]),
        (["--classes", "1,0", "--prompts", "a"], [("dog", "a"), ("cat", "a")]),
    ],
)
def test_a_model_of_both_is_asked_for_both(
    here: World, exports: Path, tmp_path: Path, words: list[str], wanted: list[tuple[str, str]]
) -> None:
    ok(here, "--export", exports / "both", *words, "--files", tmp_path / "files")
    rows = [json.loads(line) for line in (tmp_path / "files" / "samples.jsonl").read_text().splitlines()]
    assert [(row["class"], row["prompt"]) for row in rows] == wanted


def test_lines_of_text_are_classes_or_prompts(here: World, exports: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_text("House, Wooden\n\n 1 \n")
    ok(here, "--from", asked, "--files", tmp_path / "classes")
    assert {"000000-house-wooden.png", "000001-dog.png"} < set(files_of(tmp_path / "classes"))
    ok(here, "--from", asked, "--files", tmp_path / "text", "--export", exports / "text")
    assert {"000000-house-wooden.png", "000001-1.png"} < set(files_of(tmp_path / "text"))


def test_a_class_called_by_a_number_is_meant_by_its_name(here: World, exports: Path, tmp_path: Path) -> None:
    shutil.copytree(exports / "classes", tmp_path / "numbers")
    index = tmp_path / "numbers" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"class_names": ["0", "2", "10"]}))
    ok(here, "--export", tmp_path / "numbers", "--classes", "2,1", "--files", tmp_path / "files")
    assert {"000000-2.png", "000001-2.png"} < set(files_of(tmp_path / "files"))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("A red  House!", "a-red-house"), ("../../etc", "etc"), ("日本", ""), (7, "7"), (None, ""), ("x" * 99, "x" * 40)],
)
def test_names_of_files_are_safe_anywhere(said: Any, wanted: str) -> None:
    assert slug(said) == wanted


# ranks and kills ----------------------------------------------------------------------------------


def test_two_ranks_write_the_files_of_one(here: World, tmp_path: Path) -> None:
    words = ["--count", "5", "--eta", "0.5"]
    ok(here, *words, "--files", tmp_path / "one")
    assert here.do("sample", *words, "--files", str(tmp_path / "two"), ranks=2) == [0, 0], here.said()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 15 + 2
    ok(here, *words, "--out", tmp_path / "one.png")
    assert here.do("sample", *words, "--out", str(tmp_path / "two.png"), ranks=2) == [0, 0], here.said()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert not list(tmp_path.glob(".*.images"))


def test_only_what_is_lacking_is_drawn_again(here: World, tmp_path: Path) -> None:
    out, words = tmp_path / "files", ["--count", "4", "--files", tmp_path / "files"]
    ok(here, *words)
    before = files_of(out)
    names = sorted(name for name in before if name.endswith(".png"))
    (out / names[0]).unlink()
    (out / names[5]).write_bytes(before[names[5]][:-40])
    (out / names[6]).write_bytes(before[names[6]].replace(b'"steps": 2', b'"steps": 3'))  # and so a wrong CRC
    shutil.copy(out / names[8], out / names[7])  # whole, but another image
    changed = bytearray(before[names[9]])
    changed[-30] ^= 1  # of the pixels
    (out / names[9]).write_bytes(changed)
    (out / "samples.jsonl").unlink()
    kept = [name for i, name in enumerate(names) if i not in {0, 5, 6, 7, 9}]
    times = {name: (out / name).stat().st_mtime_ns for name in kept}
    assert here.do("sample", *map(str, words), ranks=2) == [0, 0], here.said()
    assert files_of(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == times


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sample_goes_on(here: World, tmp_path: Path, kill: signal.Signals) -> None:
    out, words = tmp_path / "files", ["--count", "8", "--steps", "20"]
    (process,) = here.start("sample", *words, "--files", str(out))
    deadline = time.monotonic() + 300  # the first program of a session waits for the imports
    while len(list(out.glob("0*.png"))) < 2:
        assert process.is_alive() and time.monotonic() < deadline, here.said()
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, kill)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if kill == signal.SIGKILL else 1)
    times = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert 2 <= len(times) < 24 and not (out / "samples.jsonl").exists()
    if kill == signal.SIGTERM:
        assert "run the same command again and it goes on" in here.said()
        return
    ok(here, *words, "--files", out)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    ok(here, *words, "--files", tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


# what is refused ----------------------------------------------------------------------------------


def refused(here: World, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that sample ends with."""
    capsys.readouterr()
    assert sample.main([str(here.config), *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line]
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("export", "words", "told"),
    [
        ("classes", ["--classes", "cat,eleven"], "--classes: class name 'eleven' came; known: cat, dog"),
        ("classes", ["--classes", "3"], "--classes: class id 3 came, 0 to 2 was wanted"),
        ("classes", ["--classes", "cat,"], "--classes: class name '' came"),
        ("classes", ["--prompts", "a cat"], "--prompts came; this model reads no prompts; --classes was wanted"),
        ("text", ["--classes", "cat"], "--classes came; this model knows no classes; --prompts was wanted"),
        ("text", [], "no --prompts came, which this model wants; or --from FILE"),
        ("both", ["--classes", "cat"], "no --prompts came, which this model wants"),
        ("both", ["--classes", "0,1", "--prompts", "a", "b", "c"], "--classes, --prompts: 2 and 3 came; as many"),
        ("text", ["--prompts", "\udcff"], "--prompts: 'utf-8' codec can't encode"),
        ("classes", ["--count", "0"], "--count: 0 came, 1 or more was wanted"),
        ("classes", ["--columns", "-1"], "--columns: -1 came, 1 or more was wanted"),
        ("classes", ["--columns", "1", "--count", "1"], "--count and --columns came; one of them was wanted"),
        ("classes", ["--columns", "1", "--files", "f"], "--files and --columns came; --count was wanted"),
        ("classes", ["--out", "o.png", "--files", "f"], "--files and --out came; one of them was wanted"),
        ("classes", ["--steps", "0"], "--steps: 0 came, 1 or more was wanted"),
        ("classes", ["--steps", "2000"], "`num_inference_steps`: 2000 cannot be larger than"),
        ("classes", ["--guidance", "-1"], "--guidance: -1.0 came, a finite number of 0 or more was wanted"),
        ("classes", ["--guidance", "inf"], "--guidance: inf came"),
        ("classes", ["--guidance-rescale", "1.5"], "--guidance-rescale: 1.5 came, 0 to 1 was wanted"),
        ("classes", ["--guidance-interval", "0.5", "0.2"], "--guidance-interval: 0.5 0.2 came, 0 <= START <= END"),
        ("classes", ["--eta", "nan"], "--eta: nan came, 0 to 1 was wanted"),
        ("classes", ["--eta", "1", "--scheduler", "UniPCMultistepScheduler"], "--eta: 1.0 came; UniPCMultistepSched"),
        ("classes", ["--seed", "-1"], "--seed: -1 came, an integer from 0 to 2^63 - 1 was wanted"),
        ("classes", ["--scheduler", "Euler"], "--scheduler: 'Euler' came, the name of one of diffusers' schedulers"),
        ("classes", ["--scheduler", "VQDiffusionScheduler"], "--scheduler: VQDiffusionScheduler can't be made of"),
        ("classes", ["--scheduler", "ScoreSdeVeScheduler"], "--scheduler: 'ScoreSdeVeScheduler' came, the name of"),
        ("classes", ["--scheduler", "FlowMatchEulerDiscreteScheduler"], "scheduler: FlowMatchEulerDiscreteScheduler"),
        ("nowhere", [], "{root}/nowhere: no export here; run: python -m pipeline export"),
        ("classes", ["--files", "/dev/null"], "--files: [Errno 17] File exists: '/dev/null'"),
        ("classes", ["--out", "/tmp"], "--out: /tmp: a folder came, the name of a picture was wanted"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    here: World, exports: Path, capsys: pytest.CaptureFixture[str], export: str, words: list[str], told: str
) -> None:
    line = refused(here, capsys, "--export", exports / export, *words)
    assert line.startswith(told.format(root=exports))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "", ": empty; a line for each class or prompt was wanted"),
        ("a.txt", "cat\nmouse\n", ":2: class name 'mouse' came; known: cat, dog, House, Wooden"),
        ("a.txt", b"cat\n\xff\n", ": not readable ('utf-8' codec can't decode"),
        ("a.json", "[]", ": .json came, .txt, .jsonl or .csv was wanted"),
        ("a.jsonl", '{"class": 1}\n{"class": 1,\n', ":2: not JSON: "),
        ("a.jsonl", "\n[1]\n", ":2: list came, a JSON object was wanted"),
        ("a.jsonl", '{"class": 1, "sed": 3}', ":1: unknown key 'sed'; known: class, prompt, seed, guidance"),
        ("a.jsonl", '{"class": true}', ":1: class: True came, the name or id of a class was wanted"),
        ("a.jsonl", '{"seed": 3}', ":1: no class came, which this model wants"),
        ("a.jsonl", '{"class": 0, "prompt": "a"}', ":1: prompt came; this model reads no prompts"),
        ("a.jsonl", '{"class": 0, "negative_prompt": "a"}', ":1: negative_prompt came; this model reads no prompts"),
        ("a.jsonl", '{"class": 0, "negative_class": 9}', ":1: negative_class: class id 9 came, 0 to 2 was wanted"),
        ("a.jsonl", '{"class": 0, "seed": 1.5}', ":1: seed: 1.5 came, an integer from 0 to 2^63 - 1 was wanted"),
        ("a.jsonl", '{"class": 0, "guidance": NaN}', ":1: guidance: nan came, a finite number of 0 or more"),
        ("a.csv", "class,sed\n1,2\n", ":2: unknown key 'sed'"),
        ("a.csv", "class,seed\n1,2\n1\n", ":3: 2 fields were wanted, as in the first line"),
        ("a.csv", "class,seed\n1,x\n", ":2: seed: 'x' came, an integer from 0 to 2^63 - 1 was wanted"),
        ("a.csv", "class,guidance\n1,much\n", ":2: guidance: 'much' came, a finite number of 0 or more was wanted"),
        ("a.csv", 'class\n"cat\n', ":2: not CSV: unexpected end of data"),
        ("a.csv", "class\n", ": empty; a line for each class or prompt was wanted"),
        ("none.txt", None, ": not readable ([Errno 2] No such file or directory"),
    ],
)
def test_a_wrong_line_is_named(
    here: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(here, capsys, "--from", path)
    assert line.startswith(f"{path}{told}")


def test_a_file_and_options_or_one_word_for_two_things_are_refused(
    here: World, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("cat\n")
    line = refused(here, capsys, "--from", path, "--classes", "0")
    assert line == "--from and --classes came; one of them was wanted"
    line = refused(here, capsys, "--from", path, "--export", exports / "both")
    assert line == f"{path}: this model wants a class and a prompt for each image: a .jsonl or .csv was wanted"


def test_images_of_two_commands_never_mix(here: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "files"
    refused(here, capsys, "--files", out, "--scheduler", "FlowMatchEulerDiscreteScheduler")
    assert not out.exists()
    ok(here, "--files", out, "--guidance", "3")
    before = files_of(out)
    seeds = sampler.sample_seeds(3, [0]) + sampler.sample_seeds(4, [0])
    for words, told in (
        (["--guidance", "4"], "image 0: guidance was 3.0, now 4.0"),
        (["--guidance", "3", "--seed", "4"], f"image 0: seed was {seeds[0]}, now {seeds[1]}"),
        (["--guidance", "3", "--classes", "0,2,1"], "image 1: class was 'dog', now 'House, Wooden'"),
        (["--guidance", "3", "--count", "2"], "3 images were asked for, now 6"),
    ):
        line = refused(here, capsys, "--files", out, *words)
        assert (
            line == f"--files: {out}: has images of another command: {told}. Choose another folder or remove this one"
        )
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "holiday.png")
    line = refused(here, capsys, "--files", tmp_path / "mine")
    assert "holiday.png is of no command known here" in line


def test_both_ranks_refuse_and_one_speaks(here: World, tmp_path: Path) -> None:
    words = ["--scheduler", "FlowMatchEulerDiscreteScheduler", "--files", str(tmp_path / "files")]
    assert here.do("sample", *words, ranks=2) == [2, 2]
    assert [line for line in here.said().splitlines() if line.startswith("error")] == [
        "error: scheduler: FlowMatchEulerDiscreteScheduler came, which takes the U-Net's output for 'flow_prediction'; "
        "it was trained to say 'epsilon'"
    ]


def test_an_image_does_not_hang_on_its_batch_or_its_place(here: World, tmp_path: Path) -> None:
    """Beyond rounding: a batch of another size rounds otherwise."""
    ok(here, "--classes", "0,1,2", "--count", "2", "--files", tmp_path / "four")
    ok(here, "evaluation.batch_images=1", "--classes", "0,1,2", "--count", "2", "--files", tmp_path / "one")
    for name in files_of(tmp_path / "four"):
        if name.endswith(".png"):
            assert said(tmp_path / "four" / name) == said(tmp_path / "one" / name)
            assert np.abs(pixels(tmp_path / "four" / name) - pixels(tmp_path / "one" / name)).max() <= 1
    assert torch.is_grad_enabled()
