"""What slurm/submit.py would send, without a Slurm: the scripts, the site's file, and what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from world import World

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Said:
    """How the program ended, and what it said."""

    code: int
    out: str
    errors: str


Submit = Callable[..., Said]


@pytest.fixture
def submit(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """slurm/submit.py, run in a folder that is not the project's."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm" / "submit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "submit", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(world.root)

    def run(*words: str) -> Said:
        try:
            code = module.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def dry(world: World, submit: Submit) -> Callable[..., str]:
    """The scripts that a dry run prints: each is bash."""

    def run(*words: str) -> str:
        said = submit(str(world.config), "data.lanes=24", "train.global_batch_images=24", "--dry-run", *words)
        assert (said.code, said.errors) == (0, "")
        assert subprocess.run(["bash", "-n"], input=said.out, text=True, check=False).returncode == 0
        return said.out

    return run


def code_of(script: str) -> Path:
    """The copy that a script runs."""
    (line,) = (line for line in script.splitlines() if line.startswith("PROJECT="))
    return Path(line.removeprefix("PROJECT="))


def test_a_dry_run_prints_the_script(world: World, dry: Callable[..., str]) -> None:
    options = ("--nodes=4", "--gpus-per-node=2", "--time=3:00:00", "--partition=gpu", "--account=me", "--qos=high")
    said = dry("train.steps=7", "ema.decays=[0.9, 0.99]", "--constraint=h100&ib", *options)
    code = code_of(said)
    assert code.parent == world.run_dir / "code" and not code.exists()
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --time=3:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --qos=high",
        "#SBATCH '--constraint=h100&ib'",
        "#SBATCH --requeue",
        f"#SBATCH --chdir={world.root}",
        f"BIN={Path(sys.executable).parent}",
        "CONTAINER=()",
        "STAGE=''",
        f"set -- {code}/config.yaml data.lanes=24 train.global_batch_images=24 train.steps=7 'ema.decays=[0.9, 0.99]'",
    ):
        assert line in said.splitlines(), line
    body = (ROOT / "slurm" / "train.sbatch").read_text().split("# --- what the launchers need ---")[1]
    assert said.endswith(body)  # what is tried by hand is what is sent


def test_a_change_of_the_config_is_another_version(world: World, dry: Callable[..., str]) -> None:
    before = code_of(dry("--gpus-per-node=2"))
    assert before == code_of(dry("--gpus-per-node=2"))
    world.config.write_text(world.config.read_text() + "\n# a word\n")
    assert before != code_of(dry("--gpus-per-node=2"))


def test_a_site_is_said_once(world: World, submit: Submit, dry: Callable[..., str]) -> None:
    site = world.root / "site.yaml"
    site.write_text(
        "partition: gpu\ngpus_per_node: 4\nsetup: [module load cuda]\nsbatch: [--exclusive]\nstage: /nvme\n"
    )
    said = dry("--site=site.yaml", "--partition=debug").splitlines()
    wanted = "#SBATCH --partition=debug", "#SBATCH --gpus-per-node=4", "#SBATCH --exclusive", "module load cuda"
    assert {*wanted, "STAGE=/nvme"} <= {*said}
    trap = next(i for i, line in enumerate(said) if line.startswith("trap "))
    assert trap < said.index("module load cuda") < said.index("set -u")  # modules may use what is not set
    for text, told in (
        ("partitoin: gpu", "site.yaml: partitoin: unknown key; did you mean partition?"),
        ("gpu: h1000", "site.yaml: gpu: 'h1000' came, one of "),
        ("[gpu]", "site.yaml: a list came, a mapping was wanted"),
        ("nodes: two", "site.yaml: nodes: 'two' came"),
    ):
        site.write_text(text)
        done = submit(str(world.config), "--dry-run", "--site=site.yaml")
        assert done.code == 2 and done.errors.startswith(f"error: {told}") and done.errors.count("\n") == 1


def test_a_container_is_told_what_to_see(world: World, dry: Callable[..., str]) -> None:
    here = world.root
    said = dry("--container=image.sqsh", "--gpus-per-node=2", "--stage=/nvme")
    mounts = f"{code_of(said)}:{code_of(said)},{here}:{here},/nvme:/nvme"
    words = f"--container-image=image.sqsh --container-mounts={mounts} --container-workdir={here}"
    assert f"CONTAINER=({words})\n" in said and "BIN=/usr/local/bin\n" in said
    said = dry("--container=image.sif", "--container-runtime=apptainer", "--gpus-per-node=2")
    words = f"apptainer exec --nv --bind {code_of(said)},{here} --pwd {here} image.sif"
    assert f"CONTAINER=({words})\n" in said


def test_a_chain_and_an_array_are_several_scripts(world: World, dry: Callable[..., str]) -> None:
    said = dry("--chain=3", "--gpus-per-node=2")
    assert said.count("#!/bin/bash") == said.count("#SBATCH --no-requeue") == 3 and "#SBATCH --requeue" not in said
    later = f"data.train_latents={world.root / 'later'}"
    said = dry("--array=16%4", "--gpus-per-node=2", "--nodes=2", later)
    first, second = said.split("#!/bin/bash")[1:]
    assert "--array=1-16%4" in first and "#SBATCH --nodes=1\n" in first and "encode.py" in first
    assert "--array" not in second and "#SBATCH --nodes=2\n" in second and "train.py" in second


def test_what_cannot_work_is_refused_in_one_line(world: World, submit: Submit) -> None:
    config, latents = str(world.config), f"data.train_latents={world.root / 'later'}"
    for words, told in (
        (("nosuch.yaml",), "nosuch.yaml: no such config"),
        ((config, "train.stepz=3"), "train.stepz: unknown key; nearest known key: train.steps"),
        ((config, "--nodes=7", "--gpus-per-node=3"), "21 ranks came"),
        ((config, "--gpus-per-node=1", latents), "data.train_latents: "),
        ((config, "--gpus-per-node=1", "--gpu=v100", "engine.precision=bf16"), "bf16 came, v100 has fp16 and fp32"),
        ((config, "--nodes=0"), "nodes=0, gpus_per_node=8 came"),
        ((config, "--array=0"), "argument --array: '0' came"),
        ((config, "--gpu=tpu"), "argument --gpu: invalid choice: 'tpu'"),
        ((config, "--partitoin=a"), "unrecognized arguments: --partitoin=a"),
    ):
        done = submit(*words)
        assert (done.code, done.out) == (2, ""), words
        assert done.errors.count("\n") == 1 and done.errors.startswith("error: ") and told in done.errors, done.errors
    done = submit(config, "--dry-run", "--gpus-per-node=1", latents)  # both the script and what is wrong
    assert done.code == 2 and "#SBATCH" in done.out and "error: data.train_latents: " in done.errors
