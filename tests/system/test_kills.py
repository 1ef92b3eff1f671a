"""A run that is killed and started again ends as the one that was not: every byte of weights, averages, moments."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from image_sets import write_set
from world import World, losses

from pipeline import checkpoint

KILLS = int(os.environ.get("KILLS", "10"))  # per case; the same test with more of them is the long run
SIGNALS = int(os.environ.get("SIGNALS", "5"))
STEPS = 24
START_S = 0.3  # for another rank to join


def kill(ranks: list[BaseProcess]) -> None:
    """SIGKILL every rank at once and wait until they are gone."""
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join(60)


def same_files(a: Path, b: Path) -> None:
    """Every file of two checkpoints is equal, byte by byte."""
    first = {p.relative_to(a).as_posix(): p.read_bytes() for p in a.rglob("*") if p.is_file()}
    second = {p.relative_to(b).as_posix(): p.read_bytes() for p in b.rglob("*") if p.is_file()}
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize(
    ("verb", "strategy", "ranks"),
    [("train", "ddp", 1), ("train", "ddp", 2), ("train", "zero2", 2), ("train_vae", "ddp", 1), ("train_vae", "ddp", 2)],
)
def test_killed_at_any_moment(world: World, verb: str, strategy: str, ranks: int) -> None:
    """Checkpoints are saved in every step, so kills fall into saves as often as between them."""
    words = [
        f"engine.strategy={strategy}",
        "checkpoint.every_steps=1",
        f"train.steps={STEPS}",
        f"vae.train.steps={STEPS}",
    ]
    if verb == "train_vae":  # with its adversary, which learns and is saved beside it
        words.append("vae.train.adversary.discriminator={base_channels: 8, num_downsamplings: 1}")
    where = {"train": "run_dir", "train_vae": "vae.run_dir"}[verb]
    straight, killed = world.root / "straight", world.root / "killed"
    name = f"step-{STEPS:09d}"
    began = time.time()
    assert world.do(verb, *words, f"{where}={straight}", ranks=ranks) == [0] * ranks, world.said()
    last_saved_s = (straight / "checkpoints" / name / "manifest.json").stat().st_mtime - began
    chance = random.Random(f"{verb} {strategy} {ranks}")
    reached: list[int] = []
    for _ in range(KILLS if strategy == "ddp" or KILLS > 10 else 4):  # DeepSpeed takes seconds to begin
        started = world.start(verb, *words, f"{where}={killed}", ranks=ranks)
        time.sleep(chance.uniform(0.2, 1.0) * last_saved_s)
        kill(started)
        found, _ = checkpoint.newest(killed / "checkpoints")
        reached.append(found.step if found else 0)
        if reached[-1] >= STEPS - 4:  # a kill falls into a run, not behind it
            shutil.rmtree(killed)
    assert max(reached) > 0, "no kill fell behind the first checkpoint"
    assert world.do(verb, *words, f"{where}={killed}", ranks=ranks) == [0] * ranks, world.said()
    same_files(straight / "checkpoints" / name, killed / "checkpoints" / name)
    assert losses(straight) == losses(killed)
    assert world.status(killed)["state"] == "done"
    assert not [p.name for p in (killed / "checkpoints").iterdir() if p.name.startswith(".")]


def test_one_rank_killed_ends_the_other(world: World) -> None:
    """The rank that is left does not wait for ever, and the same command goes on."""
    started = world.start("train", "train.steps=400", "checkpoint.every_steps=5", ranks=2)
    deadline = time.monotonic() + 120
    while not list((world.run_dir / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started[1].kill()
    started[0].join(120)
    assert started[0].exitcode == 1, world.said()
    started[1].join()
    assert world.status()["state"] == "failed"
    assert world.do("train", "train.steps=60", "checkpoint.every_steps=5", ranks=2) == [0, 0], world.said()


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_signalled_at_any_moment(world: World, strategy: str) -> None:
    """Any rank may be told, while it takes steps, saves or draws: all stop at the same step, and lose nothing."""
    words = ["checkpoint.every_steps=1", "evaluation.every_steps=3", "train.steps=40", f"engine.strategy={strategy}"]
    straight, told = world.root / "straight", world.root / "told"
    assert world.do("train", *words, f"run_dir={straight}", ranks=2) == [0, 0], world.said()
    chance = random.Random(strategy)
    stopped = 0
    for _ in range(SIGNALS if strategy == "ddp" or SIGNALS > 5 else 2):
        before = len(list((told / "checkpoints").glob("step-*")))
        rows = len(losses(told)) if before else 0
        started = world.start("train", *words, f"run_dir={told}", ranks=2)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not (told / "metrics.jsonl").exists() or len(losses(told)) <= rows):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2))
        number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
        os.kill(int(started[chance.randrange(2)].pid or 0), number)
        for process in started:
            process.join(120)
        if [process.exitcode for process in started] == [0, 0]:  # it was through already
            shutil.rmtree(told)
            continue
        assert [process.exitcode for process in started] == [1, 1], world.said()
        status = world.status(told)
        found, wrong = checkpoint.newest(told / "checkpoints")
        assert found is not None and not wrong
        assert status == {"state": "preempted", "step": found.step, "reason": f"{number.name} after step {found.step}"}
        assert losses(told)[-1][0] == found.step
        stopped += 1
    assert stopped > 0 and "Traceback" not in world.said()
    assert world.do("train", *words, f"run_dir={told}", ranks=2) == [0, 0], world.said()
    same_files(straight / "checkpoints" / "step-000000040", told / "checkpoints" / "step-000000040")
    assert losses(straight) == losses(told)


def test_a_second_signal_ends_it_at_once(world: World) -> None:
    started = world.start("train", "train.steps=100000", "checkpoint.every_steps=2")
    deadline = time.monotonic() + 120
    while not list((world.run_dir / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(started[0].pid or 0)
    os.kill(pid, signal.SIGSTOP)  # so that both are waiting when it goes on
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    started[0].join(60)
    assert started[0].exitcode == 1 and world.status()["state"] == "preempted"
    assert "run the same command again and it goes on" in world.said() and "Traceback" not in world.said()


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_signalled_while_it_draws(world: World, verb: str) -> None:
    """The training's folder stays as it was, and the same command goes on."""
    assert world.do("train") == [0], world.said()
    assert world.do("export") == [0], world.said()
    words = ("evaluation.num_images=4000", "evaluation.num_inference_steps=100", "evaluation.batch_images=8")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        started = world.start(verb, *words)
        time.sleep(4)
        os.kill(int(started[0].pid or 0), number)
        started[0].join(60)
        assert started[0].exitcode in (0, 1) and "Traceback" not in world.said()
    found, wrong = checkpoint.newest(world.run_dir / "checkpoints")
    assert found is not None and not wrong and world.status()["state"] == "done"


def test_a_run_folder_is_written_by_one_process(world: World) -> None:
    started = world.start("train", "train.steps=4000", log=world.root / "first.txt")
    deadline = time.monotonic() + 120
    while not (world.run_dir / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert world.do("train", "train.steps=4000") == [2]
    assert "in use by process" in world.said()
    assert world.status()["state"] == "running"
    kill(started)


def test_encode_killed_goes_on(world: World) -> None:
    """Of two views of two squares and some samples that can't be read; sometimes two jobs write at once."""
    faults = ["garbage", "zero bytes", "a label", "no image", "a caption"]
    shards = [[faults[shard % 5] if row == shard else "" for row in range(40)] for shard in range(7)]
    source = write_set(world.root / "images", shards)
    straight, killed = world.root / "straight", world.root / "killed"
    words = (f"data.train_images={source}", "data.encode_batch_images=4", "data.flip=true")
    words += ("data.crop=random", "data.encode_crops=2")
    began = time.monotonic()
    assert world.do("encode", *words, f"data.train_latents={straight}") == [0], world.said()
    whole_run_s = time.monotonic() - began
    chance, turn, kills_within = random.Random(0), 0, 0
    while kills_within < 2 * KILLS:
        turn += 1
        assert turn < 8 * KILLS, "too few kills fell into a run"
        ranks, num_jobs = 1 + chance.randrange(2), 1 + (turn % 4 == 0)
        jobs = [world.start("encode", *words, f"data.train_latents={killed}", ranks=ranks) for _ in range(num_jobs)]
        time.sleep(chance.uniform(0.1, 0.7) * whole_run_s + (ranks * num_jobs - 1) * START_S)
        kill([process for job in jobs for process in job])
        said = json.loads((killed / "dataset.json").read_text()) if (killed / "dataset.json").exists() else {}
        if said.get("complete"):
            shutil.rmtree(killed)
        elif said:
            kills_within += 1
    assert world.do("encode", *words, f"data.train_latents={killed}") == [0], world.said()
    names = sorted(p.relative_to(straight) for p in straight.rglob("*") if p.is_file() and p.name != "status.json")
    assert names == sorted(p.relative_to(killed) for p in killed.rglob("*") if p.is_file() and p.name != "status.json")
    assert [n for n in names if (straight / n).read_bytes() != (killed / n).read_bytes()] == []
    assert len((killed / "quarantine.jsonl").read_text().splitlines()) == len(shards)


def test_a_full_disk_loses_nothing(world: World) -> None:
    """A real small file system fills while a checkpoint is saved."""
    disk = world.root / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size=2m tmpfs "{disk}" && '
        f'"{sys.executable}" -m pipeline train "{world.config}" run_dir="{disk}/run" checkpoint.every_steps=1 '
        f"checkpoint.keep_last=100 train.steps=100; code=$?; "
        f'cp -a "{disk}/run" "{world.root}/left"; exit $code'
    )
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", *as_root, "--mount", "bash", "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "could not be written" in lines[0] and "run the same command again" in lines[0]
    left = world.root / "left"
    found, wrong = checkpoint.newest(left / "checkpoints")
    assert found is not None and not wrong
    assert str(found.path.name) in lines[0]
    assert world.status(left)["state"] == "failed"
    assert world.do("train", f"run_dir={left}", "train.steps=100") == [0], world.said()
