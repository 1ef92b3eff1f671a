"""A real Slurm on this machine: a controller and two nodes with eight GPUs that are none, for as long as the tests run.

Each node's daemon has a host name and a hosts file of its own; all of them listen on 127.0.0.1 alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from world import free_port

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
PATIENCE_S = 240.0  # for a job of a few seconds, on a machine that is busy
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
CompleteWait=0
OverTimeLimit=0
MessageTimeout=30
GresTypes=gpu
NodeName=n1 NodeAddr=127.0.0.1 Port={n1} CPUs=96 RealMemory=1000000 Gres=gpu:8
NodeName=n2 NodeAddr=127.0.0.1 Port={n2} CPUs=96 RealMemory=1000000 Gres=gpu:8
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""  # cred_expire: a job that goes back into the queue waits for as long before it starts again


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can.  As root it is installed where it lacks."""
    if os.geteuid() != 0:
        return "a Slurm of several nodes on one machine wants root"
    if shutil.which("slurmctld") and shutil.which("munged"):
        return None
    if shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            subprocess.run(["apt-get", "-qq", *words], capture_output=True, check=False, timeout=300)
    return None if shutil.which("slurmctld") and shutil.which("munged") else "slurm-wlm could not be installed"


class Cluster:
    """A Slurm that runs."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(at / "slurm.conf")}

    def say(self, *words: str, **more: str) -> str:
        """What one of Slurm's commands answers; it must succeed."""
        done = self.ask(*words, **more)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, *words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command that knows this Slurm.  `more`: environment variables."""
        return subprocess.run(
            words, cwd=cwd, env={**self.env, **more}, capture_output=True, text=True, check=False, timeout=120
        )

    def submit(self, log: Path, *words: str, **more: str) -> int:
        """sbatch; the job's number."""
        return int(self.say("sbatch", "--parsable", f"--output={log}", *words, **more).strip().split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What scontrol shows of a job."""
        told = self.say("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait(self, number: int | str, log: Path, until: Callable[[dict[str, str]], bool] | None = None) -> str:
        """Until a job has ended, or something else is true of it; its state."""
        ends = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            told = self.job(number)
            if (until or (lambda one: one["JobState"] in ends))(told):
                return told["JobState"]
            said = read_log(log)
            assert until is None or told["JobState"] not in ends, f"it has ended before: {told}; it said: {said}"
            assert time.monotonic() < deadline, f"it takes too long: {told}; it said: {said}"
            time.sleep(0.1)

    def clear(self) -> None:
        """End all jobs, and wait for as long as that takes: a minute at most."""
        deadline = time.monotonic() + 60
        while self.ask("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            self.ask("scancel", "--full", "--user=root")
            time.sleep(0.5)

    def lose(self, node: str) -> None:
        """A node's power is cut: its daemon and all of its processes are killed."""
        pid = int((self.at / f"slurmd-{node}.pid").read_text())
        whose = namespace(pid)
        assert whose is not None
        while of_node := [found for found in processes() if namespace(found) == whose]:
            for found in of_node:
                with suppress(OSError):
                    os.kill(found, signal.SIGKILL)
            time.sleep(0.05)

    def boot(self, node: str) -> None:
        """Start a node's daemon, which has a host name and a hosts file of its own."""
        alone = f'hostname {node} && mount --bind "{self.at}/hosts" /etc/hosts && exec slurmd -N {node}'
        self.say("unshare", "--uts", "--mount", "sh", "-c", alone)


def processes() -> list[int]:
    """The ids of all that run."""
    return [int(found.name) for found in Path("/proc").glob("[0-9]*")]


def namespace(pid: int) -> str | None:
    """Whose host name a process sees; None of one that has ended."""
    with suppress(OSError):
        if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
            return str(Path(f"/proc/{pid}/ns/uts").readlink())
    return None


def read_log(log: Path) -> str:
    """What a job has written, of which a killed process may have left half a letter."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


@contextmanager
def running() -> Iterator[Cluster]:
    """Slurm, in a folder of its own: munge wants one that everybody may enter, and all above it."""
    with TemporaryDirectory(prefix="slurm-") as at, _daemons(Path(at)) as cluster:
        yield cluster


@contextmanager
def _daemons(at: Path) -> Iterator[Cluster]:
    """Start the daemons, and stop them by their process ids, whatever comes."""
    cluster = Cluster(at)
    (at / "munge").mkdir()
    (at / "state").mkdir()
    for folder in (at, at / "munge"):
        folder.chmod(0o755)
    key = at / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    ports: set[int] = set()
    while len(ports) < 3:
        ports.add(free_port())
    host = socket.gethostname().split(".")[0]
    (at / "slurm.conf").write_text(CONF.format(host=host, at=at, **dict(zip(("ctld", *NODES), ports, strict=True))))
    for gpu in range(8):  # Slurm counts files
        (at / f"gpu{gpu}").touch()
    (at / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={at}/gpu[0-7]\n")
    (at / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(f"\n127.0.0.1 {node}" for node in NODES) + "\n")
    munge = [f"--{name.replace('_', '-')}={at}/munge/{name}" for name in ("log_file", "pid_file", "seed_file")]
    try:
        cluster.say("munged", f"--socket={at}/munge/socket", f"--key-file={key}", *munge)
        cluster.say("slurmctld", "-c")
        for node in NODES:
            cluster.boot(node)
        deadline = time.monotonic() + 60
        while cluster.ask("sinfo", "-h", "-N", "-o", "%T").stdout.split() != ["idle"] * len(NODES):
            assert time.monotonic() < deadline, cluster.ask("sinfo").stdout + (at / "slurmctld.log").read_text()
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.clear()
        for name in (*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid_file"):
            end(at / name)


def end(pid_file: Path) -> None:
    """End a daemon, politely and then not."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)
