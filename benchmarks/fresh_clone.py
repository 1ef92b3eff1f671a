"""The road's figures, from a fresh clone in a temporary folder: make demo, its scores, make test.

    python benchmarks/fresh_clone.py [demo] [test]      (both when none is named; installation is not counted)

Each figure is one JSON line; figures of the model are read from the scores.json that the demo wrote.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def figure(name: str, value: float, bound: str | None, unit: str) -> None:
    """Print a figure and whether its bound, such as "<= 8", holds; a figure without one only tells."""
    holds = None
    if bound is not None:
        relation, limit = bound.split()
        holds = value <= float(limit) if relation == "<=" else value >= float(limit)
    line = {"figure": name, "value": round(value, 4), "bound": bound, "holds": holds, "unit": unit}
    print(json.dumps(line), flush=True)


def minutes(clone: Path, target: str) -> float:
    """Run a make target and give the minutes it took; end with its output where it fails."""
    began = time.monotonic()
    with (clone / f"{target}.log").open("w") as log:
        done = subprocess.run(["make", target], cwd=clone, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit((clone / f"{target}.log").read_text()[-4000:])
    return (time.monotonic() - began) / 60


def demo(clone: Path) -> None:
    """Time make demo and read what it scored."""
    figure("make demo", minutes(clone, "demo"), "<= 8", "minutes")
    scores = json.loads((clone / "runs" / "digits_class" / "scores.json").read_text())
    figure("VAE reconstruction of held-out digits", scores["vae/psnr_db"], ">= 32", "dB PSNR")
    for scale, bound in (("1", ">= 0.95"), ("2", ">= 0.97")):
        of = f"guidance_{scale}"
        name = f"{scores[f'{of}/num_images']:,} samples at guidance {scale}"
        figure(f"{name}: named right by the classifier", scores[f"{of}/class_accuracy"], bound, "share")
    for name in ("recall", "coverage"):
        value = scores[f"guidance_1/{name}_of_validation"]
        figure(f"{name} at guidance 1, of the validation set's, at equal numbers", value, ">= 0.6", "ratio")
    for scale in ("1", "2"):
        value = scores[f"guidance_{scale}/near_copy_share"]
        figure(f"samples at guidance {scale} nearer to a training image than any real one", value, None, "share")
    again = minutes(clone, "demo")
    figure("make demo again, all there", again, None, "minutes")


def main() -> None:
    """Clone, install, measure what was asked for."""
    wanted = sys.argv[1:] or ["demo", "test"]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        minutes(clone, "env")
        if "demo" in wanted:
            demo(clone)
        if "test" in wanted:
            figure("make test", minutes(clone, "test"), "<= 12", "minutes")


if __name__ == "__main__":
    main()
