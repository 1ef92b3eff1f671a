"""Every write, flush and rename of a save fails once, for real: the kernel says so, by way of strace."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_run import Run
from world import FORKSERVER

from pipeline import checkpoint
from pipeline.errors import RunError
from pipeline.saving import Saver

FAULTS = int(os.environ.get("FAULTS", "4"))  # system calls that fail, of all that a save makes; 0: each of them
CALLS = ("openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir")
ERRORS = ("ENOSPC", "EIO")
TOLD_BYTES = 4000

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def save_under_watch(folder: str, told: Any) -> None:
    """Save step 1, stop until somebody watches, save step 2; leave what that said in shared memory, without a call."""
    run, saver = Run(), Saver(Path(folder), rank=0, num_ranks=1)
    run.step(1)
    run.begin(saver, 1)
    saver.finish()
    run.step(2)
    os.kill(os.getpid(), signal.SIGSTOP)
    said = "saved"
    try:
        run.begin(saver, 2)
        saver.finish()
    except RunError as error:
        said = str(error)
    told.value = said.encode()[:TOLD_BYTES]


def watched(root: Path, *inject: str) -> tuple[str, list[str]]:
    """What the second save said, and the system calls that it made in the folder of checkpoints."""
    folder, trace = root / "checkpoints", root / "trace.txt"
    told = FORKSERVER.RawArray("c", TOLD_BYTES + 1)
    shutil.rmtree(folder, ignore_errors=True)
    process = FORKSERVER.Process(target=save_under_watch, args=(str(folder), told))
    process.start()
    while not _is_stopped(int(process.pid or 0)):
        time.sleep(0.01)
    trace.unlink(missing_ok=True)
    words = ["strace", "-f", "-qq", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(CALLS)}", *inject]
    tracer = subprocess.Popen([*words, "-p", str(process.pid)], stderr=subprocess.PIPE, text=True)
    while "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text():
        if tracer.poll() is not None:
            process.kill()
            pytest.skip(f"strace may not look into processes here: {tracer.communicate()[1].strip()}")
        time.sleep(0.01)
    os.kill(int(process.pid or 0), signal.SIGCONT)
    process.join(120)
    tracer.wait(30)
    assert process.exitcode == 0
    lines = [line for line in trace.read_text().splitlines() if str(folder) in line]
    return told.value.decode(), lines


def _is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


def name_of(line: str) -> str:
    found = re.match(r"(?:\d+\s+)?(?:<... )?(\w+)", line)
    assert found
    return found[1]


def test_every_call_of_a_save_may_fail(tmp_path: Path) -> None:
    """Whatever fails, a whole checkpoint is left, and the error says what to do."""
    said, lines = watched(tmp_path)
    assert said == "saved"
    calls = Counter(name_of(line) for line in lines)
    assert calls["fsync"] > 10 and sum(calls[name] for name in ("write", "pwrite64")) >= 10
    assert sum(calls[name] for name in ("rename", "renameat", "renameat2")) > 3
    cases = [(name, error, nth + 1) for name, n in calls.items() for nth in range(n) for error in ERRORS]
    chosen = cases if FAULTS == 0 else random.Random(0).sample(cases, FAULTS)
    outcomes: Counter[str] = Counter()
    for name, error, nth in chosen:
        # strace counts the calls of each thread: the one that saves begins at its first.
        said, lines = watched(tmp_path, "-e", f"inject={name}:error={error}:when={nth}")
        found, wrong = checkpoint.newest(tmp_path / "checkpoints")
        assert found is not None and not wrong, (name, error, nth)
        if said == "saved":  # the call was one whose failure loses nothing
            assert found.step == 2, (name, error, nth)
        else:
            assert found.step in (1, 2), (name, error, nth)
            assert "could not be written" in said and "run the same command again" in said, (name, error, nth, said)
        outcomes["saved" if said == "saved" else "told"] += 1
        run = Run()
        run.step(1)
        run.save(tmp_path / "checkpoints", 3)  # and the disk that works again is used
        assert checkpoint.verify(tmp_path / "checkpoints" / "step-000000003").step == 3
    assert outcomes["told"] > 0
