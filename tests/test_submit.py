"""What slurm/submit.py would send, without a Slurm: the scripts, the site's file, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def submit(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The program, run in a folder that is not the project's."""
    command = [sys.executable, str(ROOT / "slurm" / "submit.py"), *words]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, check=False)


def dry(cwd: Path, *words: str) -> str:
    """The scripts that a dry run prints: each is bash."""
    done = submit(cwd, "digits_class.yaml", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    return done.stdout


def test_a_dry_run_prints_the_script(tmp_path: Path) -> None:
    options = ("--nodes=4", "--gpus-per-node=2", "--time=3:00:00", "--partition=gpu", "--account=me", "--qos=high")
    said = dry(tmp_path, "train.steps=7", "run_dir=a b", "--constraint=h100&ib", *options)
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
        f"#SBATCH --chdir={tmp_path}",
        f"PROJECT={ROOT}",
        f"BIN={Path(sys.executable).parent}",
        "CONTAINER=()",
        f"set -- {ROOT / 'configs' / 'digits_class.yaml'} train.steps=7 'run_dir=a b'",
    ):
        assert line in said.splitlines(), line
    body = (ROOT / "slurm" / "train.sbatch").read_text().split("# --- what the launchers need ---")[1]
    assert said.endswith(body)  # what is tried by hand is what is sent


def test_a_site_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "partition: gpu\ngpus_per_node: 4\nsetup: [module load cuda]\nsbatch: [--exclusive]\n"
    )
    said = dry(tmp_path, "--site=site.yaml", "--partition=debug").splitlines()
    assert {"#SBATCH --partition=debug", "#SBATCH --gpus-per-node=4", "#SBATCH --exclusive", "module load cuda"} <= {
        *said
    }
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    done = submit(tmp_path, "digits_class.yaml", "--dry-run", "--site=site.yaml")
    assert (done.returncode, done.stderr) == (2, "error: site.yaml: partitoin: unknown key; did you mean partition?\n")


def test_a_container_is_told_what_to_see(tmp_path: Path) -> None:
    said = dry(tmp_path, "--container=image.sqsh", "--gpus-per-node=2")
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path}"
    words = f"--container-image=image.sqsh --container-mounts={mounts} --container-workdir={tmp_path}"
    assert f"CONTAINER=({words})\n" in said and "BIN=/usr/local/bin\n" in said
    said = dry(tmp_path, "--container=image.sif", "--container-runtime=apptainer", "--gpus-per-node=2")
    words = f"apptainer exec --nv --bind {ROOT},{tmp_path} --pwd {tmp_path} image.sif"
    assert f"CONTAINER=({words})\n" in said


def test_a_chain_and_an_array_are_several_scripts(tmp_path: Path) -> None:
    said = dry(tmp_path, "--chain=3", "--gpus-per-node=2")
    assert said.count("#!/bin/bash") == said.count("#SBATCH --no-requeue") == 3 and "#SBATCH --requeue" not in said
    said = dry(tmp_path, "--array=16%4", "--gpus-per-node=2", "--nodes=2")
    first, second = said.split("#!/bin/bash")[1:]
    assert "--array=1-16%4" in first and "#SBATCH --nodes=1\n" in first and "encode.py" in first
    assert "--array" not in second and "#SBATCH --nodes=2\n" in second and "train.py" in second


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path) -> None:
    for words, told in (
        (("nosuch.yaml",), "nosuch.yaml: no such config"),
        (("digits_class.yaml", "train.stepz=3"), "train.stepz: unknown key; nearest known key: train.steps"),
        (("digits_class.yaml", "--nodes=7", "--gpus-per-node=3"), "21 ranks came"),
        (("digits_class.yaml", "--nodes=0"), "nodes=0, gpus_per_node=8 came"),
        (("digits_class.yaml", "--array=0"), "argument --array: '0' came"),
        (("digits_class.yaml", "--partitoin=a"), "unrecognized arguments: --partitoin=a"),
    ):
        done = submit(tmp_path, *words, "--dry-run")
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
