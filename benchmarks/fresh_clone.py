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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = "guidance_1"
CURVE = f"{GUIDANCE}/classifier/fid"  # of metrics.jsonl


def figure(name: str, value: float, bound: str | None, unit: str) -> None:
    """Print a figure and whether its bound, such as "<= 8", holds; a figure without one only tells."""
    holds = None
    if bound is not None:
        relation, limit = bound.split()
        holds = value <= float(limit) if relation == "<=" else value >= float(limit)
    line = {"figure": name, "value": round(value, 4) or value, "bound": bound, "holds": holds, "unit": unit}
    print(json.dumps(line), flush=True)


def minutes(clone: Path, target: str) -> float:
    """Run a make target and give the minutes it took; end with its output where it fails."""
    began = time.monotonic()
    with (clone / f"{target}.log").open("w") as log:
        done = subprocess.run(["make", target], cwd=clone, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit((clone / f"{target}.log").read_text()[-4000:])
    return (time.monotonic() - began) / 60


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_loop(run: Path) -> None:
    """How a score moved while the training went on, and whether `evaluate` finds the export's as it ended.

    evaluate writes its rows of evaluations.jsonl in the place of the training's; the training's curves stay.
    """
    curves = [row for row in rows_of(run / "metrics.jsonl") if CURVE in row]
    first, last = curves[0], curves[-1]
    name = f"{CURVE} in the training, step {last['step']:,} over step {first['step']:,}"
    figure(name, last[CURVE] / first[CURVE], "<= 1", "ratio")
    export = next(row for row in rows_of(run / "evaluations.jsonl")[::-1] if row["guidance_scale"] == 1)
    if export["step"] != last["step"]:
        raise SystemExit(f"{run}: the export is of step {export['step']}, the last curve's of step {last['step']}")
    both = [(last[key], value) for word, value in export["scores"].items() if (key := f"{GUIDANCE}/{word}") in last]
    figure(
        f"{len(both)} last scores of the training less those of evaluate on the export: largest difference",
        max(abs(a - b) for a, b in both),
        "<= 1e-6",
        "",
    )


def demo(clone: Path) -> None:
    """Time make demo and read what it scored."""
    figure("make demo", minutes(clone, "demo"), "<= 8", "minutes")
    in_loop(clone / "runs" / "digits_class")
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
