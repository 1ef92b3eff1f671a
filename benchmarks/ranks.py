"""Two gloo ranks against one on the demo's own config: do they read the same batches and find the same losses?

python benchmarks/ranks.py [CONFIG.yaml]      (after make demo: it needs the demo's VAE and latents)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50


def losses(run: Path) -> list[tuple[int, int, float]]:
    """(step, position, loss) of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["position"], row["loss"]) for row in rows]


def main() -> None:
    """Train both for fifty steps; print the largest difference."""
    config = sys.argv[1] if len(sys.argv) > 1 else "configs/digits_class.yaml"
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / name for name in ("one", "two")]
        for ranks, run in zip((1, 2), runs, strict=True):
            command = [str(Path(sys.executable).parent / "torchrun"), f"--nproc-per-node={ranks}", "--standalone"]
            words = [f"run_dir={run}", f"train.steps={STEPS}", "tracking.every_steps=1", "tracking.tensorboard=false"]
            words += ["engine.device=cpu", f"engine.num_processes={ranks}", "evaluation.every_steps=1000"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "pipeline/train.py", config, *words], cwd=ROOT, env=env, check=True)
        one, two = (losses(run) for run in runs)
    same = [row[:2] for row in one] == [row[:2] for row in two] and len(one) == STEPS
    difference = max(abs(a[2] - b[2]) for a, b in zip(one, two, strict=True))
    for name, value, bound, holds, unit in (
        ("two ranks against one: same steps and positions", int(same), ">= 1", same, "yes or no"),
        (
            f"largest loss difference over {STEPS} steps",
            difference,
            "<= 1e-05",
            difference <= 1e-5,
            "squared error",
        ),
    ):
        print(json.dumps({"figure": name, "value": value, "bound": bound, "holds": holds, "unit": unit}))


if __name__ == "__main__":
    main()
