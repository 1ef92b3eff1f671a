"""The kill tests at full count: is every killed and resumed run byte-identical to the undisturbed one?

python benchmarks/kills.py [KILLS]      (per case; 50 when none is given)
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


def main() -> None:
    """Run them; one line for each case."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/system/test_kills.py",
            "-k",
            "killed_at or encode_killed",
        ]
        env = {**os.environ, "KILLS": str(kills), "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        subprocess.run([*command, "--timeout=7200", f"--junitxml={report}"], cwd=ROOT, env=env, check=False)
        minutes = (time.monotonic() - began) / 60
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            passed = case.find("failure") is None and case.find("error") is None
            figure = f"{case.get('name')}: byte-identical after {kills} kills"
            line = {"figure": figure, "value": int(passed), "bound": ">= 1", "holds": passed, "unit": "yes or no"}
            print(json.dumps(line), flush=True)
    print(
        json.dumps({"figure": "duration", "value": round(minutes, 1), "bound": None, "holds": None, "unit": "minutes"})
    )


if __name__ == "__main__":
    main()
