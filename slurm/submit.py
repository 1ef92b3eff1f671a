"""Put a training into Slurm's queue: the config checked, the batch script rendered, the cluster asked, the job sent.

What would be refused is refused here, before it waits in the queue: a line for each, exit code 2.  The job runs the
programs and the config as they are now, from a copy in RUN/code.  Prints one job number a line, in the order in which
the jobs run.  Run it from the folder that the config's paths start from.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import files
from pipeline.check import plan_of, would_fail
from pipeline.config import Config
from pipeline.config_file import find_config, load_config
from pipeline.errors import UsageError
from pipeline.planning.gpus import GPUS
from pipeline.preflight import look

PROJECT = Path(__file__).resolve().parents[1]
PROGRAMS = ("pipeline", "vae", "configs")  # what a job runs of the project
FAILED, USAGE = 1, 2


class Site(BaseModel):
    """What a cluster's people write once, for all runs (--site FILE.yaml); options of the command line go before it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int | None = None  # of a node; None: eight for each GPU
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu: str | None = None  # its name in `check`: a config that wants more memory is refused
    stage: str | None = None  # a folder on each node's own disk: shards are read through it
    container: str | None = None
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: list[str] = []  # folders that the job sees besides the project's and the one it is sent from
    container_bin: str = "/usr/local/bin"  # the folder of python and accelerate in the container
    setup: list[str] = []  # lines of bash before the run: module load ..., export NCCL_...
    sbatch: list[str] = []  # options of sbatch that have none here, such as --exclusive


class Parser(argparse.ArgumentParser):
    """argparse that says one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line; exit with 2."""
        sys.stderr.write(f"error: {message}; --help shows what is known\n")
        raise SystemExit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, submit, give the exit code."""
    args = parser().parse_intermixed_args(argv)
    try:
        return submit(args)
    except UsageError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return USAGE


def parser() -> Parser:
    """The words of the command line."""
    made = Parser(
        prog="python slurm/submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("config", metavar="CONFIG.yaml", help="the run's settings, or the name of a shipped file")
    made.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value", help="laid over the file's")
    made.add_argument("--nodes", type=int)
    made.add_argument("--gpus-per-node", type=int, help="0: one process per node, on its CPU")
    made.add_argument("--cpus-per-task", type=int, help="of each node; eight for each GPU where not said")
    for name in ("time", "partition", "account", "qos", "constraint"):
        made.add_argument(f"--{name}", help=f"Slurm's --{name}")
    made.add_argument("--gpu", choices=list(GPUS), metavar="NAME", help=f"hold memory against it: {', '.join(GPUS)}")
    made.add_argument("--stage", metavar="FOLDER", help="on each node's own disk: shards are read through it")
    made.add_argument("--container", metavar="IMAGE", help="run in a container")
    made.add_argument("--container-runtime", choices=("pyxis", "apptainer"))
    made.add_argument("--site", type=Path, metavar="FILE.yaml", help="what these options are where they are not said")
    made.add_argument("--array", type=array, metavar="N[%AT_ONCE]", help="first encode, in an array of N tasks")
    made.add_argument("--chain", type=positive, metavar="K", help="K jobs, one after another, none of them requeued")
    made.add_argument("--dry-run", action="store_true", help="print scripts and refusals; send nothing")
    return made


def positive(text: str) -> int:
    """A number from 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} came, a number from 1 was wanted")
    return int(text)


def array(text: str) -> str:
    """N or N%AT_ONCE → Slurm's own words for it."""
    if not re.fullmatch(r"[1-9]\d{0,5}(%[1-9]\d{0,5})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} came, N or N%AT_ONCE was wanted, such as 16 or 64%8")
    return f"1-{text}"


def submit(args: argparse.Namespace) -> int:
    """config, site → what would fail → a copy of the programs → scripts → the cluster's word on them → jobs."""
    config_path = find_config(args.config).resolve()
    config = load_config(config_path, args.overrides)
    site = read_site(args)
    if args.array and config.data.train_latents is None:
        raise UsageError("--array: data.train_latents is null, so there is nothing to encode")
    failures = would_be_refused(config, site, encodes_first=args.array is not None)
    code = Path(config.run_dir).absolute() / "code" / version(config_path)
    words = [str(code / "config.yaml"), *args.overrides]
    name = Path(config.run_dir).name
    jobs: list[tuple[str, str]] = []  # what it is, its script
    if args.array:
        alone = site.model_copy(update={"nodes": 1, "gpus_per_node": min(1, site.gpus_per_node)})
        options = [f"--array={args.array}", "--requeue", "--output=slurm-%A_%a.log"]
        jobs.append(
            ("encode", script("encode_array.sbatch", f"encode-{name}", alone, code, options=options, words=words))
        )
    options = ["--no-requeue" if args.chain else "--requeue", "--output=slurm-%j.log"]
    jobs += [("train", script("train.sbatch", name, site, code, options=options, words=words))] * (args.chain or 1)

    if args.dry_run:
        sys.stdout.write("\n".join(text for _, text in jobs))
        sys.stdout.flush()
    if failures:
        raise UsageError("\n".join(failures))
    if args.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch: not found here; run this where Slurm is, or look at the scripts with --dry-run")
    for text in dict.fromkeys(text for _, text in jobs):
        said = sbatch(text, "--test-only")
        if said.returncode != 0:
            asked = f"{site.nodes} nodes, {site.gpus_per_node} GPUs on each, partition {site.partition or '(default)'}"
            raise UsageError(f"sbatch refuses it: {reason(said.stderr)}; asked for were {asked}")
    keep(config_path, code)
    return send(jobs)


def would_be_refused(config: Config, site: Site, *, encodes_first: bool) -> list[str]:
    """What `check` finds that would fail, a line each; of latents only where they must be there already."""
    if encodes_first:
        later = {"train_latents": None, "validation_latents": None}
        config = config.model_copy(update={"data": config.data.model_copy(update=later)})
    gpus_per_node = max(1, site.gpus_per_node)
    num_ranks = site.nodes * gpus_per_node
    found = look(config, num_ranks)
    if site.gpu is None:
        return list(found.failures)
    return would_fail(plan_of(config, found, num_ranks=num_ranks, gpu=GPUS[site.gpu], gpus_per_node=gpus_per_node))


def programs() -> list[Path]:
    """The files that a job runs, from the project's folder."""
    found = (path for top in PROGRAMS for path in (PROJECT / top).rglob("*"))
    return sorted(path.relative_to(PROJECT) for path in found if path.is_file() and path.suffix not in (".pyc", ".pyo"))


def version(config_path: Path) -> str:
    """Of the programs and the config: 12 hex digits of their content."""
    digest = hashlib.sha256(config_path.read_bytes())
    for path in programs():
        digest.update(f"\0{path}\0".encode() + (PROJECT / path).read_bytes())
    return digest.hexdigest()[:12]


def keep(config_path: Path, code: Path) -> None:
    """Copy the programs and the config, unless this very version is there: what is edited later reaches no job."""
    if code.exists():
        return
    try:
        with files.whole_folder(code) as aside:
            for path in programs():
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PROJECT / path, aside / path)
            shutil.copyfile(config_path, aside / "config.yaml")
    except OSError as error:
        raise UsageError(f"{code}: the programs could not be copied there: {error.strerror}") from None


def read_site(args: argparse.Namespace) -> Site:
    """The site's file with the command line laid over it.  Raises UsageError."""
    values: Any = {}
    if args.site is not None:
        try:
            values = yaml.safe_load(args.site.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"{args.site}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{args.site}: a {type(values).__name__} came, a mapping was wanted")
    values |= {key: said for key in Site.model_fields if (said := getattr(args, key, None)) is not None}
    try:
        site = Site.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(explain(one, args.site) for one in error.errors())) from None
    if site.gpu is not None and site.gpu not in GPUS:
        raise UsageError(f"{args.site}: gpu: {site.gpu!r} came, one of {', '.join(GPUS)} was wanted")
    if site.nodes < 1 or site.gpus_per_node < 0:
        raise UsageError(f"nodes={site.nodes}, gpus_per_node={site.gpus_per_node} came, 1 or more and 0 or more wanted")
    return site


def explain(mistake: Any, path: Path | None) -> str:
    """One line for one mistake in a site's file."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] != "extra_forbidden":
        return f"{path}: {key}: {mistake['input']!r} came: {mistake['msg']}"
    near = difflib.get_close_matches(key, Site.model_fields, n=1)
    wanted = f"did you mean {near[0]}?" if near else f"known: {', '.join(Site.model_fields)}"
    return f"{path}: {key}: unknown key; {wanted}"


def script(file: str, name: str, site: Site, code: Path, *, options: list[str], words: list[str]) -> str:
    """A batch script of this folder for one job: its options, settings and the run's words written into it."""
    cpus = site.cpus_per_task or 8 * max(1, site.gpus_per_node)
    options = [
        f"--job-name={name}",
        f"--nodes={site.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={site.gpus_per_node}",
        f"--cpus-per-task={cpus}",
        f"--time={site.time}",
        *(f"--{key}={said}" for key in ("partition", "account", "qos", "constraint") if (said := getattr(site, key))),
        f"--chdir={Path.cwd()}",
        "--open-mode=append",
        "--signal=B:USR1@180",
        *options,
        *site.sbatch,
    ]
    settings = {
        "PROJECT": shlex.quote(str(code)),
        "BIN": shlex.quote(site.container_bin if site.container else str(Path(sys.executable).parent)),
        "CONTAINER": f"({shlex.join(container(site, code))})",
    }
    if file == "train.sbatch":
        settings["STAGE"] = shlex.quote(site.stage or "")
    lines = (PROJECT / "slurm" / file).read_text(encoding="utf-8").splitlines()
    begin, body = lines[lines.index("TOLD=0") : lines.index("set -u")], lines[lines.index("set -u") :]
    for key, value in settings.items():
        (at,) = (i for i, line in enumerate(body) if line.startswith(f"{key}="))
        body[at] = f"{key}={value}"
    head = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(option)}" for option in options)]
    return "\n".join([*head, *begin, f"set -- {shlex.join(words)}", *site.setup, *body]) + "\n"


def container(site: Site, code: Path) -> list[str]:
    """The words that put a command into the container."""
    if site.container is None:
        return []
    staged = [site.stage] if site.stage else []
    folders = list(dict.fromkeys([str(code), str(Path.cwd()), *staged, *site.container_mounts]))
    if site.container_runtime == "apptainer":
        gpus = ["--nv"] if site.gpus_per_node else []
        return ["apptainer", "exec", *gpus, "--bind", ",".join(folders), "--pwd", str(Path.cwd()), site.container]
    mounts = ",".join(f if ":" in f else f"{f}:{f}" for f in folders)
    return [f"--container-image={site.container}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def sbatch(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Give Slurm a script."""
    return subprocess.run(["sbatch", *options], input=text, capture_output=True, text=True, check=False)


def reason(said: str) -> str:
    """The gist of what sbatch says: its last line."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it gives no reason"]
    return re.sub(r"^(sbatch: error: |allocation failure: )+", "", lines[-1])


def send(jobs: list[tuple[str, str]]) -> int:
    """Submit each behind the one before it: a training behind its encode's success, a chain's job behind any end."""
    encode: str | None = None
    last: str | None = None  # of a chain
    for what, text in jobs:
        behind = [f"afterok:{encode}"] * (encode is not None) + [f"afterany:{last}"] * (last is not None)
        options = [f"--dependency={','.join(behind)}", "--kill-on-invalid-dep=yes"] if behind else []
        said = sbatch(text, "--parsable", *options)
        if said.returncode != 0:
            sys.stderr.write(f"error: sbatch: {reason(said.stderr)}; the jobs printed above are in the queue\n")
            return FAILED
        number = said.stdout.strip().split(";")[0]
        encode, last = (number, None) if what == "encode" else (encode, number)
        sys.stdout.write(f"{number}\n")
        sys.stderr.write(f"{what}: job {number}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
