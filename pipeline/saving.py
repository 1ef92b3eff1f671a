"""Save a checkpoint while the training goes on: a copy in host memory first, then files written by every rank aside.

The tensors are laid out in files of a bounded size, the same ones for any number of ranks; each rank keeps and writes
those that fall to it.  Nothing here talks through the ranks' collectives, since it runs beside them: ranks leave their
hashes in the folder, and rank 0, when all are there, writes the manifest and gives the folder its name.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline import checkpoint, files
from pipeline.errors import RunError

MAX_FILE_BYTES = 2 << 30  # of one safetensors file
POLL_S = 0.02


Shapes = Mapping[str, Mapping[str, torch.Size]]  # stem, a file's path without its ending → parameter name → shape


@dataclass(frozen=True)
class File:
    """A safetensors file of a checkpoint, and who writes it."""

    path: str
    names: tuple[str, ...]
    rank: int


def plan_files(shapes: Shapes, num_ranks: int, max_bytes: int = MAX_FILE_BYTES) -> dict[str, list[File]]:
    """Stem → its files.  Each goes to the rank that has the fewest bytes to write so far."""
    load = [0] * num_ranks
    planned: dict[str, list[File]] = {}
    for stem, of_stem in shapes.items():
        portions: list[list[str]] = [[]]
        sizes = [0]
        for name, shape in of_stem.items():
            num_bytes = 4 * shape.numel()
            if portions[-1] and sizes[-1] + num_bytes > max_bytes:
                portions.append([])
                sizes.append(0)
            portions[-1].append(name)
            sizes[-1] += num_bytes
        planned[stem] = []
        for number, (names, size) in enumerate(zip(portions, sizes, strict=True), start=1):
            rank = min(range(num_ranks), key=lambda r: (load[r], r))
            load[rank] += size
            of = f"-{number:05d}-of-{len(portions):05d}" if len(portions) > 1 else ""  # diffusers' names
            planned[stem].append(File(f"{stem}{of}.safetensors", tuple(names), rank))
    return planned


def indices(shapes: Shapes, planned: Mapping[str, list[File]]) -> dict[str, Any]:
    """Path → what tells diffusers in which of several files a parameter lies."""
    found: dict[str, Any] = {}
    for stem, of_stem in planned.items():
        if len(of_stem) > 1:
            total = sum(4 * shape.numel() for shape in shapes[stem].values())
            where = {name: Path(file.path).name for file in of_stem for name in file.names}
            found[f"{stem}.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": where}
    return found


class Saver:
    """Writes checkpoints into a folder, one at a time, beside the training.  One per rank."""

    def __init__(self, folder: Path, *, rank: int, num_ranks: int, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder, self.rank, self.num_ranks, self.max_file_bytes = folder, rank, num_ranks, max_file_bytes
        self._held: dict[tuple[str, str], Tensor] = {}  # fp32 on the host: what this rank wrote last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(
        self,
        step: int,
        shapes: Shapes,
        tensors: Iterable[tuple[str, str, Tensor]],
        documents: Mapping[str, Any],
        *,
        on_main: Callable[[Callable[[], None]], Any],
        done: Callable[[Path], None],
    ) -> None:
        """Copy what this rank writes, and let it be written as `folder`/step-N beside what comes next.

        `tensors`: (stem, name, tensor) of all in `shapes`, the same ones in the same order on every rank, since getting
        them may be a collective.  `documents`: path → JSON value, for rank 0 to write.  `on_main`: runs a function on
        rank 0 while the others wait.  `done`: called on rank 0, beside the training, with the folder that has its name
        now.  Raises RunError where it can't begin, or the save before this one failed.
        """
        self.finish()
        aside = self.folder / f".step-{step:09d}.part"

        def clear() -> None:
            with _told(step, self.folder):
                for left in self.folder.glob(".step-*.part"):  # of a killed process
                    shutil.rmtree(left, ignore_errors=True)
                aside.mkdir(parents=True)

        on_main(clear)
        planned = plan_files(shapes, self.num_ranks, self.max_file_bytes)
        owners = {(stem, name): file for stem, of in planned.items() for file in of for name in file.names}
        mine: dict[str, dict[str, Tensor]] = {}
        on_device = False
        for stem, name, tensor in tensors:
            file = owners[stem, name]
            if file.rank == self.rank:
                mine.setdefault(file.path, {})[name] = self._copied(stem, name, tensor)
                on_device = on_device or tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        documents = {**documents, **indices(shapes, planned)}
        self._thread = threading.Thread(
            target=self._write, args=(step, aside, mine, documents, done), name=f"save step {step}", daemon=True
        )
        self._thread.start()

    def _copied(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        """A copy in host memory, in the place of the last save's: asking for memory anew takes as long as copying."""
        place = self._held.get((stem, name))
        if place is None:
            place = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._held[stem, name] = place
        return place.copy_(tensor.detach(), non_blocking=True)

    def failed(self) -> bool:
        """Whether the save under way has failed on this rank."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the save under way.  Raises RunError where it failed on this rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self,
        step: int,
        aside: Path,
        mine: dict[str, dict[str, Tensor]],
        documents: Mapping[str, Any],
        done: Callable[[Path], None],
    ) -> None:
        try:
            with _told(step, self.folder):
                listed = self._write_mine(aside, mine)
                if self.rank == 0:
                    done(self._write_rest(step, aside, listed, documents))
        except Exception as error:
            self._error = error
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                with suppress(OSError):
                    files.write_json(_note(aside, self.rank), {"error": str(error)})

    def _write_mine(self, aside: Path, mine: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        listed: dict[str, Any] = {}
        for path in sorted(mine):
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            save_file(mine[path], aside / path, metadata={"format": "pt"})
            listed[path] = checkpoint.seal(aside / path)
        if self.rank != 0:
            files.write_json(_note(aside, self.rank), {"files": listed})
        return listed

    def _write_rest(self, step: int, aside: Path, listed: dict[str, Any], documents: Mapping[str, Any]) -> Path:
        """Rank 0: the documents, and when all ranks' files are there, the manifest and the name."""
        for path, value in documents.items():
            files.write_json(aside / path, value)
            listed[path] = checkpoint.seal(aside / path)
        for rank in range(1, self.num_ranks):
            note = _note(aside, rank)
            while not note.exists():
                time.sleep(POLL_S)
            said = files.read_json(note)
            if "error" in said:
                raise RunError(said["error"])
            listed |= said["files"]
            note.unlink()
        final = self.folder / f"step-{step:09d}"
        checkpoint.publish(aside, final, listed)
        return final


def _note(aside: Path, rank: int) -> Path:
    """Where a rank leaves what it has written."""
    return aside / f".rank-{rank:05d}.json"


@contextmanager
def _told(step: int, folder: Path) -> Generator[None]:
    """Let an error say what was lost, which is nothing, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        older = [path.name for path in checkpoint.list_steps(folder)]
        raise RunError(
            f"step {step}: the checkpoint could not be written to {folder}: {error}. Nothing saved before is lost "
            f"({older[0] if older else 'there is none yet'}): make room or mend the disk, then run the same command "
            "again"
        ) from error
