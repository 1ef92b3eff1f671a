"""The batch scripts on a real Slurm of two nodes: time limits, lost nodes, failures, and what becomes of the run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from slurm_cluster import ROOT, Cluster, missing, processes, read_log, running
from test_kills import same_files
from world import World, losses

ALL = os.environ.get("SLURM_CASES") == "all"  # as in the long run; else some of the cases
BAD_MOMENTS = 10 if ALL else 2  # preemptions at the worst times
PER_JOB = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
NO_END = 100_000  # steps: it is told to end when the test has seen enough, on machines of any speed


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Slurm.  Where SLURM_WANTED is set, as .ci/run does it, it is an error that there is none."""
    if reason := missing():
        (pytest.fail if os.environ.get("SLURM_WANTED") else pytest.skip)(reason)
    with running() as found:
        yield found


@pytest.fixture(autouse=True)
def ends_clean(cluster: Cluster, world: World) -> Iterator[None]:
    """What a failed test leaves in the queue would fail those after it; pytest shows what its jobs wrote."""
    yield
    cluster.clear()
    for log in sorted(world.root.glob("*.txt")) + sorted(world.root.glob("slurm-*.log")):
        print(f"--- {log.name}\n{read_log(log)}")


def submit_train(cluster: Cluster, world: World, *words: str, options: tuple[str, ...] = (), **env: str) -> int:
    """sbatch slurm/train.sbatch, as it is written in the documentation."""
    job = (*PER_JOB, *options, "slurm/train.sbatch", str(world.config), *words)
    return cluster.submit(world.root / "job.txt", *job, RETRY_WAIT_S="0", **env)


SAVES = "checkpoint.every_steps=20"


def submit_endless(cluster: Cluster, world: World, *words: str, options: tuple[str, ...] = (), **env: str) -> int:
    """A training whose last step is set_end's to say: each turn reads the config anew."""
    set_end(world, NO_END)
    return submit_train(cluster, world, *(words or (SAVES,)), options=options, **env)


def set_end(world: World, step: int, config: Path | None = None) -> None:
    """Write the last step into the config."""
    path = config or world.config
    values = yaml.safe_load(path.read_text())
    values["train"]["steps"] = step
    path.write_text(yaml.safe_dump(values))


def ends_as_undisturbed(cluster: Cluster, world: World, job: int, *words: str) -> None:
    """Let the turn that is in the queue be the last: all bytes are those of two ranks that nothing happened to."""
    last = saved_step(world) + 20
    set_end(world, last)
    straight = world.root / "straight"
    same = (*(words or (SAVES,)), f"run_dir={straight}", "engine.num_processes=2")
    assert world.do("train", *same, ranks=2) == [0, 0], world.said()
    assert cluster.wait(job, world.root / "job.txt") == "COMPLETED", said(world)
    name = f"step-{last:09d}"
    same_files(straight / "checkpoints" / name, world.run_dir / "checkpoints" / name)
    assert losses(straight) == losses(world.run_dir)


def saved_step(world: World) -> int:
    """0 where the run has not begun."""
    return world.status()["step"] if (world.run_dir / "status.json").exists() else 0


def said(world: World) -> str:
    """What a job wrote."""
    return read_log(world.root / "job.txt")


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_nodes_train_as_two_ranks_without_slurm(cluster: Cluster, world: World, strategy: str) -> None:
    """Sent by submit.py; shards are read through each node's own disk."""
    apart, disk = world.root / "apart", world.root / "disk"
    done = submit_py(cluster, world, f"engine.strategy={strategy}", "--nodes=2", f"--stage={disk}")
    assert done.returncode == 0, done.stderr
    log = world.root / f"slurm-{done.stdout.strip()}.log"
    words = (f"run_dir={apart}", f"engine.strategy={strategy}", "engine.num_processes=2")
    assert world.do("train", *words, ranks=2) == [0, 0], world.said()
    assert cluster.wait(done.stdout.strip(), log) == "COMPLETED", read_log(log)
    assert "turn 0: 2 ranks on n[1-2]" in read_log(log) and "turn 0: done, step 8 is saved" in read_log(log)
    assert len(losses(world.run_dir)) == 8 and losses(world.run_dir) == losses(apart)
    same_files(apart / "checkpoints" / "step-000000008", world.run_dir / "checkpoints" / "step-000000008")
    shards = {path.name for path in disk.iterdir() if path.name != "lock"}
    assert shards and all(len(name) == 64 for name in shards)


def test_what_is_edited_later_reaches_no_job_that_waits(cluster: Cluster, world: World) -> None:
    """Neither the programs nor the config: the job runs what there was when it was sent."""
    project = world.root / "project"
    for part in ("pipeline", "vae", "configs", "slurm"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    (world.root / "site.yaml").write_text("sbatch: [--hold]\n")
    done = submit_py(cluster, world, "--site=site.yaml", project=project)
    assert done.returncode == 0, done.stderr
    (job,) = done.stdout.split()
    (project / "pipeline" / "train.py").write_text("raise SystemExit('edited')\n")
    (project / "pipeline" / "config.py").write_text("raise SystemExit('edited')\n")
    world.config.write_text("edited: true\n")
    cluster.say("scontrol", "release", job)
    log = world.root / f"slurm-{job}.log"
    assert cluster.wait(job, log) == "COMPLETED", read_log(log)
    assert len(losses(world.run_dir)) == 8


def reach(cluster: Cluster, world: World, job: int, step: int) -> None:
    """Wait until a run has made a step."""
    rows = world.run_dir / "metrics.jsonl"
    cluster.wait(
        job, world.root / "job.txt", lambda _: rows.exists() and (losses(world.run_dir) or [(0,)])[-1][0] >= step
    )


def test_the_time_limit_costs_no_step(cluster: Cluster, world: World) -> None:
    """Slurm's own signal before the limit, then two in the middle: save, queue, go on, to the same last byte."""
    job = submit_endless(cluster, world, options=("--time=1", "--signal=B:USR1@45"))
    log = world.root / "job.txt"
    cluster.wait(job, log, lambda one: one["Restarts"] == "1")
    cluster.say("scontrol", "update", f"jobid={job}", "TimeLimit=20")
    assert "turn 0: preempted" in said(world)
    for turn in (1, 2):
        before = world.status()["step"]
        reach(cluster, world, job, before + 5)
        cluster.say("scancel", "--batch", "--signal=USR1", str(job))
        cluster.wait(job, log, lambda one, after=str(turn + 1): one["Restarts"] == after)
        assert world.status()["state"] == "preempted" and world.status()["step"] >= before + 5
    ends_as_undisturbed(cluster, world, job)
    assert "turn 3: done" in said(world)


@pytest.mark.parametrize("moment", range(BAD_MOMENTS))
def test_no_moment_is_a_bad_one(cluster: Cluster, world: World, moment: int) -> None:
    """Told to stop twice, within seconds of its start or where every step saves and draws pictures."""
    wait = random.Random(moment)
    words = ("checkpoint.every_steps=1", "evaluation.every_steps=1")
    job = submit_endless(cluster, world, *words)
    log = world.root / "job.txt"
    for turn in range(2):
        cluster.wait(job, log, lambda one, turn=turn: one["JobState"] == "RUNNING" and one["Restarts"] == str(turn))
        if moment % 2:
            reach(cluster, world, job, saved_step(world) + wait.randrange(1, 8))
        time.sleep(wait.uniform(0, 0.5) if moment % 2 else wait.uniform(0.5, 5))  # bash reads its first lines
        cluster.say("scancel", "--batch", "--signal=USR1", str(job))
        cluster.wait(job, log, lambda one, after=str(turn + 1): one["Restarts"] == after)
    ends_as_undisturbed(cluster, world, job, *words)
    drawn = [{p.name for p in (run / "samples").iterdir()} for run in (world.root / "straight", world.run_dir)]
    assert drawn[0] == drawn[1]


def test_fewer_nodes_go_on_with_the_same_batches(cluster: Cluster, world: World) -> None:
    """Some steps on two nodes, 50 on one: the same samples, and the losses of a run that stayed on two."""
    job, log = submit_endless(cluster, world), world.root / "job.txt"
    reach(cluster, world, job, 25)
    cluster.say("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait(job, log, lambda one: one["Restarts"] == "1")
    cluster.say("scancel", str(job))
    cluster.wait(job, log)
    left_at = saved_step(world)
    set_end(world, left_at + 50)
    fewer = submit_train(cluster, world, SAVES, options=("--nodes=1",))
    straight = world.root / "straight"
    words = (SAVES, f"run_dir={straight}", "engine.num_processes=2")
    assert world.do("train", *words, ranks=2) == [0, 0], world.said()
    assert cluster.wait(fewer, log) == "COMPLETED", said(world)
    assert "turn 0: 1 ranks on n" in said(world)
    ours, theirs = losses(world.run_dir), losses(straight)
    assert len(ours) == left_at + 50 and [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert ours[:left_at] == theirs[:left_at]
    assert max(abs(a[2] - b[2]) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@pytest.mark.parametrize("node", ["n1", "n2"] if ALL else ["n1"])
def test_a_lost_node_costs_no_byte(cluster: Cluster, world: World, node: str) -> None:
    """Its daemon and all of its processes are gone; the batch script ran on n1.  Slurm queues the job by itself."""
    job = submit_endless(cluster, world)
    reach(cluster, world, job, 25)
    cluster.lose(node)
    cluster.wait(job, world.root / "job.txt", lambda one: one["Restarts"] == "1")
    cluster.boot(node)
    ends_as_undisturbed(cluster, world, job)
    assert "turn 0: 2 ranks" in said(world) and "turn 1: done" in said(world)


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0), *([(signal.SIGSTOP, 1), (signal.SIGKILL, 0)] * ALL)]
)
def test_a_killed_or_hung_rank_is_tried_again(cluster: Cluster, world: World, number: int, rank: int) -> None:
    """The other rank ends, too, and the job's next turn goes on.  A rank that hangs costs its two timeouts."""
    job = submit_endless(cluster, world, SAVES, "train.hang_timeout_s=10", LEFT_ALONE_S="5")
    reach(cluster, world, job, 25)
    for pid in rank_pids(job, rank):
        os.kill(pid, number)
    cluster.wait(job, world.root / "job.txt", lambda one: one["Restarts"] == "1")
    ends_as_undisturbed(cluster, world, job)
    assert "turn 0: failed" in said(world) and "turn 1: done" in said(world)
    assert not (world.run_dir / "failures.txt").exists()


def rank_pids(job: int, rank: int) -> list[int]:
    """The processes of a job's rank."""
    return pids_with(f"SLURM_JOB_ID={job}", f"RANK={rank}")


def pids_with(*environment: str, program: str = "") -> list[int]:
    """The processes that have these words in their environment, and that Python was told to run this file."""
    found: list[int] = []
    for pid in processes():
        with suppress(OSError):
            told = set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if set(environment) <= told and any(word.endswith(program) for word in words[:2]):
                found.append(pid)
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


def submit_py(
    cluster: Cluster, world: World, *words: str, project: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """slurm/submit.py, run in a folder that is not the project's."""
    command = (sys.executable, str(project / "slurm" / "submit.py"), str(world.config))
    return cluster.ask(*command, "--gpus-per-node=0", "--cpus-per-task=1", *words, cwd=world.root, **env)


def test_an_array_encodes_what_one_process_does(cluster: Cluster, world: World) -> None:
    """Four tasks, two at a time, one killed and one told to stop, and the training when all have ended well."""
    images = str(Path(yaml.safe_load(world.config.read_text())["data"]["train_images"]).with_name("train"))
    words = [f"data.train_images={images}", "conditioning.num_classes=10"]
    one, several = world.root / "one", world.root / "several"
    (world.root / "site.yaml").write_text("sbatch: [--hold]\n")  # until somebody looks
    sent = (f"data.train_latents={several}", "--array=4%2", "--site=site.yaml")
    done = submit_py(cluster, world, *words, *sent, RETRY_WAIT_S="0")
    assert done.returncode == 0, done.stderr
    encode, train = done.stdout.split()
    cluster.say("scontrol", "release", train, encode)
    most = 0
    disturbed: dict[str, int] = {}

    def look(_: dict[str, str]) -> bool:
        """Count those that run; kill the first task's program, and tell the second to stop, once each."""
        nonlocal most
        states = cluster.say("squeue", "-h", "-r", f"--jobs={encode},{train}", "-o", "%T").split()
        most = max(most, states.count("RUNNING"))
        for task, number in (("1", signal.SIGKILL), ("2", signal.SIGUSR1)):
            found = [] if task in disturbed else pids_with(f"SLURM_ARRAY_TASK_ID={task}", program="encode.py")
            if found and number == signal.SIGKILL:
                for pid in found:
                    with suppress(OSError):
                        os.kill(pid, number)
                disturbed[task] = len(found)
            elif found and cluster.ask("scancel", "--batch", "--signal=USR1", f"{encode}_{task}").returncode == 0:
                disturbed[task] = len(found)
        return True

    log = world.root / f"slurm-{train}.log"
    cluster.wait(train, log, lambda one: look(one) and one["JobState"] == "COMPLETED")
    assert world.do("encode", *words, f"data.train_latents={one}") == [0], world.said()
    assert most == 2 and disturbed.keys() == {"1", "2"}
    first, second = (read_log(world.root / f"slurm-{encode}_{task}.log") for task in (1, 2))
    assert first.count("turn 0 on") == 2 and "turn 1" not in first  # begun again in its place
    assert "back into the queue" in second and "turn 1 on" in second
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
    (copied,) = (world.run_dir / "code").glob("*/config.yaml")
    set_end(world, last, config=copied)
    cluster.say("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait(first, world.root / f"slurm-{first}.log") == "FAILED"
    log = world.root / f"slurm-{second}.log"
    assert cluster.wait(second, log) == "COMPLETED", read_log(log)
    assert [row[0] for row in losses(world.run_dir)] == list(range(1, last + 1))
    assert "preempted" in read_log(world.root / f"slurm-{first}.log")


def test_what_slurm_would_refuse_is_refused_before_it_waits(cluster: Cluster, world: World) -> None:
    """One line each, exit code 2, nothing in the queue; what needs no Slurm to be refused is tests/test_submit.py's."""
    many = ("--nodes=2", "--gpus-per-node=9", "data.lanes=36", "train.global_batch_images=36")
    for words, env, told in (
        (("train.stepz=3",), {}, "train.stepz: unknown key; nearest known key: train.steps"),
        (("--partition=nosuch",), {}, "sbatch refuses it: Invalid partition name specified"),
        (many, {}, "sbatch refuses it: "),
        ((), {"PATH": "/nowhere"}, "sbatch: not found here"),
    ):
        done = submit_py(cluster, world, *words, **env)
        assert (done.returncode, done.stdout) == (2, ""), (words, done)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
    assert not cluster.say("squeue", "-h") and not (world.run_dir / "code").exists()
