"""What does the report of a run of a million logged steps cost?

python benchmarks/report.py      (one thread; a minute)

A metrics.jsonl of 1e6 rows with the columns that training writes, a spike among them, and a thousand evaluations of
three scores, at two guidance scales each.  Made twice: the time is the second one's, by the clock.
With KEEP=FILE the page is kept there.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from pipeline.reporting import page

ROOT = Path(__file__).resolve().parents[1]
ROWS, EVALUATIONS, IMAGES_PER_STEP = 1_000_000, 1000, 64
SPIKE_ROW, SPIKE = 654_321, 9.75
SEED = 0


def write_run(run: Path) -> None:
    """A run's folder as a training leaves it, without pictures."""
    config = yaml.safe_load((ROOT / "configs" / "digits_class.yaml").read_text())
    config |= {"run_dir": str(run), "train": {"steps": ROWS, "global_batch_images": IMAGES_PER_STEP}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "status.json").write_text(json.dumps({"state": "done", "step": ROWS, "reason": None}))
    rng = np.random.default_rng(SEED)
    step = np.arange(1, ROWS + 1)
    loss = 0.13 + 0.7 * np.exp(-step / 40_000) + 0.01 * rng.standard_normal(ROWS)
    loss[SPIKE_ROW] = SPIKE
    columns = {
        "step": step,
        "position": step * IMAGES_PER_STEP,
        "loss": loss,
        "learning_rate": 1e-4 * np.cos(step / ROWS * np.pi / 2),
        "grad_norm": np.exp(0.3 * rng.standard_normal(ROWS)),
        "replaced": np.zeros(ROWS, int),
        "images_per_s": 500 + 20 * rng.standard_normal(ROWS),
        "data_wait_s": np.abs(0.001 * rng.standard_normal(ROWS)),
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    with (run / "metrics.jsonl").open("w") as file:
        for values in zip(*lists.values(), strict=True):
            file.write(json.dumps(dict(zip(lists, values, strict=True))) + "\n")
    with (run / "evaluations.jsonl").open("w") as file:
        for number in range(1, EVALUATIONS + 1):
            for guidance in (1.0, 2.0):
                scores = {name: 1 / number + guidance * rng.random() for name in ("fid", "precision", "recall")}
                row = {"step": number * (ROWS // EVALUATIONS), "checkpoint": None, "ema": "decay-0.999"}
                row |= {"guidance_scale": guidance, "num_inference_steps": 50, "num_images": 1000}
                file.write(json.dumps(row | {"references": {"a": "f"}, "scores": scores}) + "\n")


def say(figure: str, value: float, bound: str, holds: bool, unit: str) -> None:
    """One line of the result."""
    print(json.dumps({"figure": figure, "value": round(value, 3), "bound": bound, "holds": holds, "unit": unit}))


def main() -> None:
    """Write the run, make its report, look for the spike in it."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        write_run(run)
        page.write_report(run)
        start = time.monotonic()
        path = page.write_report(run)
        seconds = time.monotonic() - start
        if os.environ.get("KEEP"):
            shutil.copy(path, os.environ["KEEP"])
        text = path.read_text(encoding="utf-8")
        size = path.stat().st_size / 1e6
        logged = (run / "metrics.jsonl").stat().st_size / 1e6
    library = sum(len(page.text_of(f"uplot/{file}")) for file in ("uPlot.iife.min.js", "uPlot.min.css")) / 1e6
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say("rows of metrics.jsonl", ROWS, "none", True, "rows")
    say("metrics.jsonl", logged, "none", True, "MB")
    say("report of 1e6 logged steps, without pictures", size, "<= 3", size <= 3, "MB")
    say("its chart library", library, "<= 1.5", library <= 1.5, "MB")
    say("report of 1e6 logged steps made in", seconds, "<= 30", seconds <= 30, "s")
    say("most memory of the process, the writing of the rows included", memory, "none", True, "GiB")
    charts = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    highest = max(charts["training"][0]["series"][0]["high"])
    say("highest loss in the page, of one spike in 1e6 rows", highest, str(SPIKE), highest == SPIKE, "")


if __name__ == "__main__":
    main()
