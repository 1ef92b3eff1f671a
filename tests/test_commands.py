"""The command line as a user meets it: exit codes, one line per error, status.json.

Most commands run in processes forked from a server that has imported torch and diffusers once; where the start of
the process itself is what is promised, a fresh interpreter is started.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml
from PIL import Image

from pipeline.__main__ import VERBS
from pipeline.config_file import load_config
from pipeline.data.index import ShardSet
from pipeline.run_folder import claim, write_status

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    *("train_vae", "measure_vae", "encode", "train", "reconstruct"),
    *("export", "sample", "page", "evaluate", "sweep", "report"),
)
PURPOSES = {
    "prepare": "Make image shards",
    "index": "Check a folder of WebDataset tars",
    "check": "Say what a run will take",
    "train-vae": "Train the autoencoder on images",
    "measure-vae": "Measure an autoencoder",
    "encode": "Encode image shards into latent shards",
    "train": "Train the latent diffusion model",
    "ema": "Average the weights over another length",
    "export": "into a diffusers folder",
    "sample": "Draw images of classes, prompts or both",
    "page": "Serve a page that draws",
    "evaluate": "Score a model against the real images",
    "sweep": "Score a model at every combination of sampler settings",
    "report": "Make RUN/report.html anew",
    "schema": "Print the JSON Schema",
}
# Starts programs as files, where neither the folder above them nor the installed package is on the path, and prints
# their exit codes.  What others wrote is imported once, before each program gets a process of its own.
AS_FILES = """
import os, runpy, sys
import accelerate, torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
root, clean = sys.argv[1], list(sys.path)
assert root not in clean
for name in sys.argv[2:]:
    child = os.fork()
    if not child:
        sys.path[:] = [f"{root}/pipeline", *clean[1:]]
        sys.argv = [f"{root}/pipeline/{name}.py", "--help"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(99)  # a program leaves by itself
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int | None
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line it wrote to stderr."""
        (line,) = self.err.splitlines()
        return line


class Do(Protocol):
    """`python -m pipeline WORDS`, to its end."""

    def __call__(self, *words: str | Path, rank: int | None = None) -> Done: ...


def fresh(*words: str | Path, cwd: Path = ROOT, **environment: str) -> Done:
    """Start a fresh interpreter."""
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


def become(words: list[str], cwd: str, rank: int | None, out: str, err: str) -> None:
    """Be `python -m pipeline WORDS`."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.pop("RANK", None)
    if rank is not None:
        os.environ["RANK"] = str(rank)
    sys.argv = ["pipeline", *words]
    del sys.modules["pipeline.__main__"]  # imported by this file
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)


@pytest.fixture
def do(tmp_path: Path) -> Do:
    """Run commands in the test's folder."""
    context = multiprocessing.get_context("forkserver")

    def run(*words: str | Path, rank: int | None = None) -> Done:
        out, err = tmp_path / ".out", tmp_path / ".err"
        for path in (out, err):
            path.unlink(missing_ok=True)
        process = context.Process(target=become, args=([*map(str, words)], str(tmp_path), rank, str(out), str(err)))
        process.start()
        process.join(300)
        return Done(process.exitcode, out.read_text(), err.read_text())

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of real digits."""
    out = tmp_path_factory.mktemp("digits")
    done = fresh("-m", "pipeline", "prepare", "digits", out, "--size", "16")
    assert (done.code, done.err.splitlines()[-1]) == (0, f"the shards are in {out}/train and {out}/validation")
    return out


@pytest.fixture
def settings(digits: Path, tmp_path: Path) -> dict[str, Any]:
    """A small config; its own folders are those of the test."""
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {
            "train_images": str(digits / "validation"),
            "train_latents": str(tmp_path / "latents"),
            "image_size": 16,
            "lanes": 12,
            "workers": 0,
        },
        "vae": {
            "run_dir": str(tmp_path / "vae"),
            "path": str(tmp_path / "vae" / "autoencoder"),
            "model": {"block_out_channels": [4, 4], "norm_num_groups": 2},
            "train": {"steps": 1, "global_batch_images": 4, "warmup_steps": 0},
        },
        "conditioning": {"num_classes": 10},
        "train": {"steps": 1, "global_batch_images": 4},
        "engine": {"device": "cpu"},
        "tracking": {"tensorboard": False},
    }


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    """The same, in a file."""
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


# finding one's way --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_verb_the_verbs_are_listed(words: tuple[str, ...]) -> None:
    done = fresh("-m", "pipeline", *words)
    assert (done.code, done.err) == (0, "")
    for verb, what in VERBS.items():
        assert f"  {verb} " in done.out
        assert what in done.out


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("trian", "did you mean train?"),
        ("train_vae", "did you mean train-vae?"),
        ("exprot", "did you mean export?"),
        ("xyzzy", f"known: {', '.join(VERBS)}"),
        ("--debug", f"known: {', '.join(VERBS)}"),
    ],
)
def test_an_unknown_verb_is_told_the_nearest(verb: str, told: str) -> None:
    done = fresh("-m", "pipeline", verb)
    assert (done.code, done.out) == (2, "")
    assert done.line == f"error: {verb}: no such verb; {told}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_is_for(do: Do, verb: str) -> None:
    done = do(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: python -m pipeline {verb} ")
    assert PURPOSES[verb] in done.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train",), "the following arguments are required: CONFIG.yaml;"),
        (("train", "c.yaml", "--fast"), "unrecognized arguments: --fast;"),
        (("train", "c.yaml", "seed=1", "--deb"), "unrecognized arguments: --deb;"),
        (("sample", "c.yaml", "--columns", "many"), "argument --columns: invalid int value: 'many';"),
        (("sample", "c.yaml", "--columns"), "argument --columns: expected one argument;"),
        (("index",), "the following arguments are required: folder;"),
        (("index", "a", "b"), "unrecognized arguments: b;"),
        (("prepare", "digits"), "the following arguments are required: out;"),
        (("prepare", "letters", "out"), "argument kind: invalid choice: 'letters' (choose from "),
        (("schema", "now"), "unrecognized arguments: now;"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(do: Do, words: tuple[str, ...], told: str) -> None:
    done = do(*words)
    assert (done.code, done.out) == (2, "")
    assert done.line.startswith(f"python -m pipeline {words[0]}: {told}")
    assert done.line.endswith(" --help shows what is known")


def test_the_schema_is_printed_alone() -> None:
    done = fresh("-m", "pipeline", "schema")
    assert (done.code, done.err) == (0, "")
    assert done.out == (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")


# programs as files --------------------------------------------------------------------------------


def test_a_program_starts_as_a_file_from_any_folder(tmp_path: Path) -> None:
    done = fresh(ROOT / "pipeline" / "train.py", "--help", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert PURPOSES["train"] in done.out


def test_every_program_finds_its_packages_by_itself(tmp_path: Path) -> None:
    """Launchers put the folder of the file on the path, not the one above it."""
    elsewhere = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    done = fresh("-S", "-c", AS_FILES, ROOT, *PROGRAMS, cwd=tmp_path, PYTHONPATH=elsewhere)
    codes = [line for line in done.out.splitlines() if line.split(" ")[0] in PROGRAMS]
    assert codes == [f"{name} 0" for name in PROGRAMS], done.err


# wrong settings -----------------------------------------------------------------------------------


def test_an_unknown_key_ends_a_program_with_2_and_one_line(config: Path, tmp_path: Path) -> None:
    done = fresh("-m", "pipeline", "train", config, "optimizer.learning_rat=1")
    told = "command line: optimizer.learning_rat: unknown key; nearest known key: optimizer.learning_rate"
    assert (done.code, done.out, done.line) == (2, "", f"error: {told}")
    assert status(tmp_path / "run") == {"state": "usage", "step": 0, "reason": told}


def test_each_mistake_has_its_line(do: Do, config: Path, tmp_path: Path) -> None:
    done = do("train", config, "train.steps=0", "sed=1")
    assert done.code == 2
    assert [line.split(": ")[:3] for line in done.err.splitlines()] == [
        ["error", "command line", "train.steps"],
        ["error", "command line", "sed"],
    ]
    assert status(tmp_path / "run")["reason"] == done.err.replace("error: ", "").strip()


@pytest.mark.parametrize("order", [["--debug", "sed=1"], ["sed=1", "--debug"]])
def test_debug_shows_the_traceback_too(do: Do, config: Path, order: list[str]) -> None:
    done = do("train", config, *order)
    assert done.code == 2
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.splitlines()[-1].startswith("error: command line: sed: unknown key")


@pytest.mark.parametrize(
    "verb", ["train-vae", "measure-vae", "encode", "train", "export", "sample", "page", "evaluate", "sweep", "report"]
)
def test_every_program_refuses_a_config_in_one_line(do: Do, config: Path, verb: str) -> None:
    done = do(verb, config, "vae=3")
    assert (done.code, done.out) == (2, "")
    assert done.line.startswith("error: command line: vae: 3 came")


def test_a_config_that_names_no_folder_leaves_none_behind(do: Do, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("run_dir: [")
    before = set(tmp_path.iterdir())
    done = do("train", "broken.yaml")
    assert done.code == 2
    assert done.line.startswith("error: broken.yaml:1: not valid YAML")
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {".out", ".err"}


def test_a_missing_config_is_told_the_shipped_ones(do: Do) -> None:
    done = do("train", "no.yaml")
    assert (done.code, done.line.split("; ")[0]) == (2, "error: no.yaml: no such config")
    assert "digits_class.yaml" in done.line


@pytest.mark.parametrize("words", [("sed=1",), ("--fast",)])
def test_only_the_first_rank_speaks_for_all(do: Do, config: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = do("train", config, *words, rank=1)
    assert done == Done(2, "", "")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(do: Do, config: Path, tmp_path: Path) -> None:
    done = do("train", config, f"run_dir={config}/run")
    assert done.code == 2
    assert f"error: {config}/run: [Errno 20] Not a directory: '{config}/run'" in done.err.splitlines()
    assert "Traceback" not in done.err


# wrong data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda folder: None, "no such folder of shards"),
        (lambda folder: folder.mkdir(), "no *.tar in this folder"),
        (lambda folder: (folder.mkdir(), (folder / "0.tar").touch()), "not indexed; run: python -m pipeline index"),
    ],
    ids=["missing", "empty", "not indexed"],
)
def test_shards_that_are_not_ready(do: Do, config: Path, tmp_path: Path, made: Any, told: str) -> None:
    made(tmp_path / "shards")
    done = do("train-vae", config, f"data.train_images={tmp_path}/shards")
    assert (done.code, done.out) == (2, "")
    assert done.line.startswith(f"error: data.train_images: {tmp_path}/shards: {told}")
    assert status(tmp_path / "vae") == {"state": "usage", "step": 0, "reason": done.line.removeprefix("error: ")}


def test_the_status_lies_where_the_run_does_by_default_too(do: Do, settings: dict[str, Any], tmp_path: Path) -> None:
    del settings["vae"]["run_dir"]
    settings["data"]["train_images"] = "nowhere"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    done = do("train-vae", "small.yaml")
    assert done.code == 2
    assert status(tmp_path / "runs" / "vae")["state"] == "usage"


def test_pictures_that_are_not_read_are_told_of(do: Do, tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "dog" / "2.gif").touch()
    done = do("prepare", "folder", tmp_path / "pictures", tmp_path / "out", "--size", "8", "--validation", "0.5")
    told = "passed over: 1 .gif (such as dog/2.gif); JPEG, PNG and WebP in class folders are read"
    assert done.code == 0
    assert done.err.splitlines()[-3] == f"warning: {tmp_path}/pictures: {told}"


def test_a_folder_is_indexed_or_its_bad_shard_named(do: Do, digits: Path, tmp_path: Path) -> None:
    torn = tmp_path / "shards" / "000000.tar"
    torn.parent.mkdir()
    whole = (digits / "validation" / "000000.tar").read_bytes()

    torn.write_bytes(whole)
    done = do("index", torn.parent)
    assert (done.code, done.line.endswith(" samples in 1 shards")) == (0, True)

    torn.write_bytes(whole[: len(whole) // 2])
    done = do("index", torn.parent)
    assert done.code == 2
    assert done.line.startswith(f"error: {torn}: at byte ")


def test_every_sample_is_read_if_asked(do: Do, digits: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "000000.tar"
    shard.parent.mkdir()
    whole = (digits / "validation" / "000000.tar").read_bytes()
    count = ShardSet(digits / "validation", open_shards=1).counts[0]

    shard.write_bytes(whole)
    done = do("index", shard.parent, "--samples", "--workers", "2")
    assert (done.code, done.err.splitlines()[-1]) == (0, f"{shard.parent}: all {count} samples can be read")

    at = whole.index(b"\x89PNG")
    shard.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    done = do("index", shard.parent, "--samples")
    listed = shard.parent / "index" / "bad_samples.jsonl"
    reason = "not a readable JPEG, PNG, WEBP image: none of these"
    assert done.code == 1
    assert done.err.splitlines()[-2:] == [
        f"1  {reason}; first: 000000.tar: '00000000'",
        f"error: {shard.parent}: 1 of {count} samples can't be used, and training would replace them; they are listed "
        f"in {listed}",
    ]
    assert json.loads(listed.read_text()) == {"shard": "000000.tar", "key": "00000000", "reason": reason}

    shard.write_bytes(whole)
    done = do("index", shard.parent, "--samples")
    assert (done.code, listed.exists()) == (0, False)


# how programs end ---------------------------------------------------------------------------------


def test_a_program_that_is_done_says_so_and_the_next_asks_for_the_one_between(
    do: Do, config: Path, tmp_path: Path
) -> None:
    done = do("train-vae", config)
    assert done.code == 0
    assert status(tmp_path / "vae") == {"state": "done", "step": 1, "reason": None}

    done = do("encode", config, f"data.train_latents={config}/latents")  # there is a file in the way
    assert done.code == 2
    assert done.line == f"error: data.train_latents: [Errno 20] Not a directory: '{config}/latents'"

    done = do("train", config)  # encode comes first
    assert done.code == 2
    told = f"data.train_latents: {tmp_path}/latents: no such folder of latents; run encode with this config first"
    assert done.line == f"error: {told}"
    assert status(tmp_path / "run")["state"] == "usage"

    done = do("export", config)  # train comes first
    assert done.code == 2
    assert done.line == f"error: {tmp_path}/run/checkpoints: no whole checkpoint; train with this config first"


def test_a_missing_autoencoder_is_named_by_its_key(do: Do, config: Path, tmp_path: Path) -> None:
    done = do("train", config)
    assert (done.code, done.line.startswith("error: vae.path: ")) == (2, True)
    assert str(tmp_path / "vae" / "autoencoder") in done.line


@pytest.mark.parametrize("verb", ["sample", "evaluate", "sweep"])
def test_a_missing_export_is_told_the_command(do: Do, config: Path, digits: Path, tmp_path: Path, verb: str) -> None:
    done = do(verb, config, f"data.validation_images={digits}/validation")
    assert done.code == 2
    assert done.line.startswith(f"error: {tmp_path}/run/export: no export here; run: python -m pipeline export")


def test_work_that_fails_ends_with_1(do: Do, config: Path, tmp_path: Path) -> None:
    done = do("train-vae", config, "vae.train.kl_weight=1e300")  # infinite in float32
    told = done.err.splitlines()[-1]
    assert done.code == 1
    assert told.startswith("error: step 1, positions 0 to 3: loss inf")
    assert "Traceback" not in done.err
    assert status(tmp_path / "vae") == {"state": "failed", "step": 0, "reason": told.removeprefix("error: ")}


def test_what_nobody_foresaw_ends_with_1_and_keeps_its_traceback(do: Do, config: Path, tmp_path: Path) -> None:
    (tmp_path / "vae" / "config.yaml").mkdir(parents=True)  # a file is to be written there
    done = do("train-vae", config)
    assert done.code == 1
    assert done.line.startswith("error: IsADirectoryError: ")
    assert status(tmp_path / "vae")["state"] == "failed"
    assert (tmp_path / "vae" / "traceback-0.txt").read_text().startswith("Traceback")


# somebody else's run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "in use by process {pid} on "),
        (("sed=1",), "sed: unknown key"),
        (("engine.num_processes=2",), "engine.num_processes: 2 ranks were asked for, 1 came"),
    ],
    ids=["started twice", "mistyped", "wrong number of ranks"],
)
def test_a_live_run_keeps_its_status(do: Do, config: Path, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    run = tmp_path / "run"
    claim(run, load_config(config), ())  # by this very process
    write_status(run, "running", step=40)
    done = do("train", config, *words)
    assert done.code == 2
    assert told.format(pid=os.getpid()) in done.line
    assert status(run) == {"state": "running", "step": 40, "reason": None}
