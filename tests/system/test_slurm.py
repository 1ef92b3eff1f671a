"""The batch scripts on a real Slurm of two nodes: time limits, lost nodes, failures, and what becomes of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from slurm_cluster import ROOT, Cluster, missing, read_log, running
from test_kills import same_files
from world import World, losses

PER_JOB = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
NO_END = 100_000  # steps: it is told to end when the test has seen enough, on machines of any speed


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Slurm.  Where SLURM_WANTED is set, as .ci/run does it, it is an error that there is none."""
    if reason := missing():
        (pytest.fail if os.environ.get("SLURM_WANTED") else pytest.skip)(reason)
    with running() as found:
        yield found


def submit_train(cluster: Cluster, world: World, *words: str, options: tuple[str, ...] = (), **env: str) -> int:
    """sbatch slurm/train.sbatch, as it is written in the documentation."""
    job = (*PER_JOB, *options, "slurm/train.sbatch", str(world.config), *words)
    return cluster.submit(world.root / "job.txt", *job, RETRY_WAIT_S="0", **env)


def submit_endless(cluster: Cluster, world: World, options: tuple[str, ...] = ()) -> int:
    """A training whose last step is set_end's to say: each turn reads the config anew."""
    set_end(world, NO_END)
    return submit_train(cluster, world, "checkpoint.every_steps=20", options=options)


def set_end(world: World, step: int) -> None:
    """Write the last step into the config."""
    values = yaml.safe_load(world.config.read_text())
    values["train"]["steps"] = step
    world.config.write_text(yaml.safe_dump(values))


def ends_as_undisturbed(cluster: Cluster, world: World, job: int) -> None:
    """Let the turn that is in the queue be the last: all bytes are those of two ranks that nothing happened to."""
    last = world.status()["step"] + 20
    set_end(world, last)
    straight = world.root / "straight"
    words = ("checkpoint.every_steps=20", f"run_dir={straight}", "engine.num_processes=2")
    assert world.do("train", *words, ranks=2) == [0, 0], world.said()
    assert cluster.wait(job, world.root / "job.txt") == "COMPLETED", said(world)
    name = f"step-{last:09d}"
    same_files(straight / "checkpoints" / name, world.run_dir / "checkpoints" / name)
    assert losses(straight) == losses(world.run_dir)


def said(world: World) -> str:
    """What a job wrote."""
    return read_log(world.root / "job.txt")


def test_two_nodes_train_as_two_ranks_without_slurm(cluster: Cluster, world: World) -> None:
    apart = world.root / "apart"
    job = submit_train(cluster, world)
    assert world.do("train", f"run_dir={apart}", "engine.num_processes=2", ranks=2) == [0, 0], world.said()
    assert cluster.wait(job, world.root / "job.txt") == "COMPLETED", said(world)
    assert "turn 0: 2 ranks on n[1-2]" in said(world) and "turn 0: done, step 8 is saved" in said(world)
    assert len(losses(world.run_dir)) == 8 and losses(world.run_dir) == losses(apart)
    same_files(apart / "checkpoints" / "step-000000008", world.run_dir / "checkpoints" / "step-000000008")


def reach(cluster: Cluster, world: World, job: int, step: int) -> None:
    """Wait until a run has made a step."""
    rows = world.run_dir / "metrics.jsonl"
    cluster.wait(
        job, world.root / "job.txt", lambda _: rows.exists() and (losses(world.run_dir) or [(0,)])[-1][0] >= step
    )


def test_the_time_limit_costs_no_step(cluster: Cluster, world: World) -> None:
    """Slurm's own signal before the limit, then one in the middle: save, queue, go on, to the same last byte."""
    job = submit_endless(cluster, world, options=("--time=1", "--signal=B:USR1@45"))
    log = world.root / "job.txt"
    cluster.wait(job, log, lambda one: one["Restarts"] == "1")
    cluster.say("scontrol", "update", f"jobid={job}", "TimeLimit=20")
    assert "turn 0: preempted" in said(world)
    before = world.status()["step"]
    reach(cluster, world, job, before + 5)
    cluster.say("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait(job, log, lambda one: one["Restarts"] == "2")
    assert world.status()["state"] == "preempted" and world.status()["step"] >= before + 5
    ends_as_undisturbed(cluster, world, job)
    assert "turn 2: done" in said(world)


def test_a_lost_node_costs_no_byte(cluster: Cluster, world: World) -> None:
    """Slurm ends what is left of the job and queues it; what was saved is gone on from."""
    job = submit_endless(cluster, world)
    reach(cluster, world, job, 25)
    cluster.say("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(job, world.root / "job.txt", lambda one: one["Restarts"] == "1")
    cluster.ask("scontrol", "update", "nodename=n2", "state=resume")  # unless it has come back by itself
    ends_as_undisturbed(cluster, world, job)
    assert "turn 0: 2 ranks" in said(world) and "turn 1: done" in said(world)


def test_a_killed_rank_is_tried_again(cluster: Cluster, world: World) -> None:
    """The other rank ends, too, and the job's next turn goes on."""
    job = submit_endless(cluster, world)
    reach(cluster, world, job, 25)
    for pid in rank_pids(job, rank=1):
        os.kill(pid, signal.SIGKILL)
    cluster.wait(job, world.root / "job.txt", lambda one: one["Restarts"] == "1")
    ends_as_undisturbed(cluster, world, job)
    assert "turn 0: failed" in said(world) and "turn 1: done" in said(world)
    assert not (world.run_dir / "failures.txt").exists()


def rank_pids(job: int, rank: int) -> list[int]:
    """The processes of a job's rank."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
            if {f"SLURM_JOB_ID={job}", f"RANK={rank}"} <= told:
                found.append(int(process.name))
    return found


def test_what_fails_each_time_is_not_tried_for_ever(cluster: Cluster, world: World) -> None:
    job = submit_train(cluster, world, "train.hang_timeout_s=0.000001", MAX_FAILURES="1")
    assert cluster.wait(job, world.root / "job.txt") == "FAILED"
    assert "turn 0: failed" in said(world) and "turn 1: failed" in said(world) and "turn 2" not in said(world)
    assert "failed 2 times without a newer checkpoint: no more retries" in said(world)
    assert world.status()["state"] == "failed"


def test_a_wrong_config_is_not_tried_again(cluster: Cluster, world: World) -> None:
    job = submit_train(cluster, world, "conditioning.num_classes=5")
    assert cluster.wait(job, world.root / "job.txt") == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0" and "turn 1" not in said(world)
    assert world.status()["state"] == "usage"


def submit_py(cluster: Cluster, world: World, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """slurm/submit.py, run in a folder that is not the project's."""
    command = (sys.executable, str(ROOT / "slurm" / "submit.py"), str(world.config))
    return cluster.ask(*command, "--gpus-per-node=0", "--cpus-per-task=1", *words, cwd=world.root, **env)


def test_an_array_encodes_what_one_process_does(cluster: Cluster, world: World) -> None:
    """Four tasks, two at a time, and the training when all have ended well."""
    images = str(Path(yaml.safe_load(world.config.read_text())["data"]["train_images"]).with_name("train"))
    words = [f"data.train_images={images}", "conditioning.num_classes=10"]
    one, several = world.root / "one", world.root / "several"
    done = submit_py(cluster, world, *words, f"data.train_latents={several}", "--array=4%2")
    assert done.returncode == 0, done.stderr
    encode, train = done.stdout.split()
    most = 0

    def count(_: dict[str, str]) -> bool:
        nonlocal most
        states = cluster.say("squeue", "-h", "-r", f"--jobs={encode},{train}", "-o", "%T").split()
        most = max(most, states.count("RUNNING"))
        return True

    cluster.wait(train, world.root / f"slurm-{train}.log", lambda one: count(one) and one["JobState"] == "COMPLETED")
    assert world.do("encode", *words, f"data.train_latents={one}") == [0], world.said()
    assert most == 2
    names = sorted(p.name for p in one.glob("*.tar"))
    assert len(names) == 7 and names == sorted(p.name for p in several.glob("*.tar"))
    assert [n for n in (*names, "dataset.json") if (one / n).read_bytes() != (several / n).read_bytes()] == []
    assert world.status()["state"] == "done"


def test_a_chain_goes_on_where_the_one_before_was_ended(cluster: Cluster, world: World) -> None:
    """Jobs that may not be requeued, each behind the end of the one before it."""
    set_end(world, NO_END)
    done = submit_py(cluster, world, "--chain=2")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert cluster.job(second)["JobState"] == "PENDING" and f"afterany:{first}" in cluster.job(second)["Dependency"]
    assert cluster.job(first)["Requeue"] == "0"
    reach(cluster, world, int(first), 5)
    last = losses(world.run_dir)[-1][0] + 600  # the next job starts at once
    set_end(world, last)
    cluster.say("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait(first, world.root / f"slurm-{first}.log") == "FAILED"
    log = world.root / f"slurm-{second}.log"
    assert cluster.wait(second, log) == "COMPLETED", read_log(log)
    assert [row[0] for row in losses(world.run_dir)] == list(range(1, last + 1))
    assert "preempted" in read_log(world.root / f"slurm-{first}.log")


def test_what_slurm_would_refuse_is_refused_before_it_waits(cluster: Cluster, world: World) -> None:
    """One line each, exit code 2, nothing in the queue."""
    queue = cluster.say("squeue", "-h")
    for words, env, told in (
        (("train.stepz=3",), {}, "train.stepz: unknown key; nearest known key: train.steps"),
        (("--partition=nosuch",), {}, "sbatch refuses it: Invalid partition name specified"),
        (
            ("--nodes=2", "--gpus-per-node=9", "data.lanes=36", "train.global_batch_images=36"),
            {},
            "sbatch refuses it: ",
        ),
        (("--nodes=3",), {}, "sbatch refuses it: "),
        (("--nodes=5",), {}, "5 ranks came"),
        ((), {"PATH": "/nowhere"}, "sbatch: not found here"),
        (("--nodes=two",), {}, "argument --nodes: invalid int value: 'two'"),
        (("--chain=0",), {}, "argument --chain: '0' came, a number from 1 was wanted"),
    ):
        done = submit_py(cluster, world, *words, **env)
        assert (done.returncode, done.stdout) == (2, ""), (words, done)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
    assert cluster.say("squeue", "-h") == queue
