"""The built wheel installs and runs away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist of this checkout, unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    for command in (
        ["-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "site"), "WHEEL"],
    ):
        words = [str(next(folder.glob("*.whl"))) if word == "WHEEL" else word for word in command]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """python -m pipeline ... where only the wheel's packages and their dependencies can be imported."""
    env = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{sysconfig.get_path('purelib')}"}
    command = [sys.executable, "-S", "-m", "pipeline", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_its_programs_run_with_the_shipped_config(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "prepare", "digits", "data/digits")
    assert done.returncode == 0, done.stderr
    words = ["digits_class.yaml", "vae.train.steps=2", "vae.train.global_batch_images=4", "data.workers=0"]
    done = run(installed, tmp_path, "train-vae", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits_vae" / "autoencoder" / "config.json").exists()
    done = run(installed, tmp_path, "report", "digits_class.yaml", "run_dir=runs/digits_vae")  # its template came along
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits_vae" / "report.html").exists()


def test_it_carries_nothing_but_the_packages(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops - {"bin"} == {"pipeline", "vae"}
    assert (installed / "pipeline" / "configs" / "digits_class.yaml").exists()
