"""accelerate launch with each of the shipped engine configs starts real ranks, which train alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategy_runs import STRATEGIES, Leg, run
from world import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_engine_config_starts_two_ranks(strategy: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(ROOT / "configs" / "engine" / f"{strategy}.yaml"), "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "strategy_program.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "1"} if strategy == "ddp" else {})},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = run(Leg("ddp", 1, 3), tmp_path / "alone.pt")
    for rank in (0, 1):
        said = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert (said["strategy"], said["ranks"]) == (strategy, 2)
        assert all(abs(a - b) <= 1e-6 * b for a, b in zip(said["losses"], alone["losses"], strict=True))
