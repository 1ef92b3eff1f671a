"""What does a second rank bring, and how many bytes does it send for each strategy?

python benchmarks/scaling.py      (two cores, gloo, one thread a rank; five minutes)

The step of train_step.py over one rank and over two, under each strategy: a global batch of 64 images, whole and in two
micro-batches.  Bytes are those that the kernel counted on a rank's own TCP connections, beside what `check` plans with
(pipeline.planning.traffic).  Time is CPU seconds of a rank, gloo's threads among them, and wall time, which is noise
where the cores have other work; medians of the steps.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pairs import say
from steps import config_of, our_training, write_set

from pipeline.planning.traffic import traffic

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
WARM_STEPS, STEPS, BATCH = 3, 10, 64
TCP_INFO, BYTES_ACKED = 11, 120  # of <linux/tcp.h>: the option, and where tcpi_bytes_acked lies in its struct


def sent_bytes() -> int:
    """By this process over all its TCP connections, since each began: what the other side has acknowledged."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    info = found.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, BYTES_ACKED)[0]
        except OSError:  # closed meanwhile, or no stream
            continue
    return total


def measure(strategy: str, num_micro: int, folder: Path) -> None:
    """One rank's steps; rank 0 prints what it found."""
    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = f"{strategy}-{num_micro}-{num_ranks}-{rank}"
    batch = {"global_batch_images": BATCH, "micro_batch_images": BATCH // num_ranks // num_micro}
    config = config_of(folder, name, train=batch, engine={"strategy": strategy}, data={"workers": 0})
    training, loss_of = our_training(config)
    steps = training.steps(loss_of)
    for _ in range(WARM_STEPS):
        next(steps)
    cpu: list[float] = []
    wall: list[float] = []
    before = sent_bytes()
    for _ in range(STEPS):
        start = time.perf_counter(), time.process_time()
        next(steps)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    found: dict[str, Any] = {"cpu_s": statistics.median(cpu), "wall_s": statistics.median(wall)}
    found["sent_bytes"] = (sent_bytes() - before) / STEPS
    found["num_trained"] = sum(p.numel() for p in training.learner.models["unet"].parameters())
    if rank == 0:
        print(json.dumps(found), flush=True)
    training.engine.wait()
    os._exit(0)


def run(strategy: str, num_ranks: int, num_micro: int, folder: Path) -> dict[str, float]:
    """What rank 0 of so many found."""
    port = 20_000 + os.getpid() % 10_000
    started: list[subprocess.Popen[str]] = []
    for rank in range(num_ranks):
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port} if num_ranks > 1 else {}
        environment = {**os.environ, **{key: str(value) for key, value in said.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, strategy, str(num_micro), str(folder)]
        started.append(
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=600) for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(error[-2000:] for _, error in told))
    return json.loads(told[0][0].strip().splitlines()[-1])


def main() -> None:
    """One rank, two ranks, every strategy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder / "set")
        alone = run("ddp", 1, 1, folder)
        say("one rank, 64 images: CPU time of a step", alone["cpu_s"], "none", True, "s")
        for strategy in STRATEGIES:
            for num_micro in (1, 2):
                found = run(strategy, 2, num_micro, folder)
                count = int(found["num_trained"])
                planned = traffic(count, strategy=strategy, precision="fp32", num_ranks=2, num_micro=num_micro).total
                ratio = found["sent_bytes"] / planned
                title = f"{strategy}, two ranks, {num_micro} micro-batch{'es' * (num_micro > 1)}"
                say(f"{title}: bytes that a rank sends in a step", found["sent_bytes"], "none", True, "bytes")
                if strategy == "fsdp2":  # gloo's reduce-scatter is an all-reduce: as many bytes of gradients again
                    say(f"{title}: over what is planned", ratio, "none: gloo sends gradients twice", True, "ratio")
                else:
                    say(f"{title}: over what is planned", ratio, "0.98 to 1.02", abs(ratio - 1) <= 0.02, "ratio")
                if num_micro == 1:
                    share = found["cpu_s"] / (alone["cpu_s"] / 2)
                    say(f"{title}: a rank's CPU time over half of one rank's", share, "none", True, "ratio")
                    speed = alone["wall_s"] / found["wall_s"]
                    say(f"{title}: images/s of wall time over one rank's", speed, "none", True, "ratio")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    main()
