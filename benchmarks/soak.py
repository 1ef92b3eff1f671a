"""The tests of tests/system at full count, which takes hours where CI takes a seeded sample.

python benchmarks/soak.py [GROUP ...]      (all groups when none is named)

  kills      SIGKILL at 50 random moments of each kind of run: is the resumed run byte-identical to the undisturbed one?
  signals    SIGTERM, SIGUSR1, SIGUSR2 to any rank at 20 moments, saves and pictures among them
  faults     every open, write, flush and rename of a save made to fail once, with ENOSPC and with EIO
  strategies every ordered pair of DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 over a save, and every setting
  slurm      a real Slurm of two nodes: ten preemptions at bad moments, either node lost, either rank hung
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {  # name: (test file, expression, environment)
    "kills": ("test_kills.py", "killed_at or encode_killed", {"KILLS": "50"}),
    "signals": ("test_kills.py", "signal", {"SIGNALS": "20"}),
    "faults": ("test_save_faults.py", "", {"FAULTS": "0"}),
    "strategies": ("test_strategy_pairs.py", "", {"PAIRS": "all"}),
    "slurm": ("test_slurm.py", "", {"SLURM_CASES": "all", "SLURM_WANTED": "1"}),
}


def main() -> None:
    """Run the groups; a line for each of their tests, or for all of them where they are many."""
    for group in sys.argv[1:] or GROUPS:
        file, expression, env = GROUPS[group]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"tests/system/{file}", "-k", expression]
            began = time.monotonic()
            subprocess.run(
                [*command, "--timeout=14400", f"--junitxml={report}"],
                cwd=ROOT,
                env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
                stdout=sys.stderr,
                check=False,
            )
            minutes = (time.monotonic() - began) / 60
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        passed = [case for case in cases if not {"failure", "error", "skipped"} & {child.tag for child in case}]
        said = " ".join(f"{name}={value}" for name, value in env.items())
        if len(cases) > 20:
            say(f"{group} ({said})", len(passed), len(cases), "cases that hold")
        else:
            for case in cases:
                say(f"{group} ({said}): {case.get('name')}", int(case in passed), 1, "yes or no")
        line = {"figure": f"{group}: duration", "value": round(minutes, 1), "bound": None, "holds": None}
        print(json.dumps({**line, "unit": "minutes"}), flush=True)


def say(figure: str, value: int, wanted: int, unit: str) -> None:
    """One line of the result."""
    line = {"figure": figure, "value": value, "bound": f">= {wanted}", "holds": value >= wanted, "unit": unit}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
