"""Encode image shards into latent shards: one output tar for each input tar, posterior moments and labels.

Shards are shared out over the ranks.  Each is written aside and renamed, so a killed encode goes on where it was when
the same command is run again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import Module
from tqdm import tqdm
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipeline import files, program
from pipeline.config import Config, DataConfig
from pipeline.data import images, latents
from pipeline.data.index import ShardSet, build_index
from pipeline.data.latents import Origin
from pipeline.data.pieces import class_label, image_part
from pipeline.engine import Engine
from pipeline.errors import SampleError, UsageError, blame
from pipeline.run_folder import write_status
from vae.model import load, weights_sha256
from vae.moments import MomentStatistics, encode_moments


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("encode", __doc__ or "")
    return program.run_config(made, argv, encode, _first_latents)


def _first_latents(raw: dict[str, Any]) -> str | None:
    """The folder that a raw config encodes to; the first where there are several."""
    named: Any = raw["data"]["train_latents"]
    return next(iter(named), None) if isinstance(named, list | tuple) else named  # pyright: ignore


def encode(config: Config, args: argparse.Namespace) -> None:
    """config → engine → frozen VAE → the training set's latents → the validation set's."""
    del args
    engine = Engine(config.engine)
    data, status = config.data, Path((config.data.train_latents or ("",))[0])
    with blame("vae.path"):
        vae = load(config.vae.path)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if data.image_size % factor:
        raise UsageError(f"data.image_size: {data.image_size} came, a multiple of the VAE's factor {factor} was wanted")
    vae_sha256 = weights_sha256(vae)
    Module.to(vae, engine.device)
    sets = [("data.train_images", data.train_images[0], (data.train_latents or ("",))[0])]
    if data.validation_images and data.validation_latents:
        sets.append(("data.validation_images", data.validation_images, data.validation_latents))
    for key, source, out in sets:
        with blame(key):
            shards = ShardSet(Path(source), open_shards=1)
        origin = Origin(
            vae_sha256=vae_sha256,
            image_size=data.image_size,
            crop="centre",
            flip=False,
            precision=config.engine.precision,
            batch_images=data.encode_batch_images,
            source_fingerprint=shards.fingerprint,
        )
        engine.main_does(partial(begin_set, Path(out), origin))
        engine.main_does(partial(write_status, status, "running"))
        encode_set(engine, vae, shards, Path(out), data)
        engine.wait()
        engine.main_does(partial(finish_set, shards, Path(out), origin))
    engine.main_does(partial(write_status, status, "done"))
    if engine.is_main:
        scale = latents.describe(status)["scale"]
        program.say(f"the latents are in {', '.join(out for _, _, out in sets)}; their measured scale is {scale:.4f}")


def begin_set(out: Path, origin: Origin) -> None:
    """Refuse a folder that holds something else; say what is being made in a new one."""
    if (out / "dataset.json").exists():
        latents.check_same_origin(out, latents.describe(out), origin)
    else:
        said = {"format": latents.FORMAT, "kind": "latents", "complete": False, "origin": asdict(origin)}
        files.write_json(out / "dataset.json", said)


def encode_set(engine: Engine, vae: AutoencoderKL, shards: ShardSet, out: Path, data: DataConfig) -> None:
    """Write this rank's shards that are not there yet."""
    mine = range(engine.rank, len(shards.names), engine.num_ranks)
    with tqdm(
        total=sum(shards.counts[i] for i in mine),
        desc=f"encode {shards.location}",
        unit=" images",
        dynamic_ncols=True,
        disable=not engine.is_main,
    ) as bar:
        for name, count in ((shards.names[i], shards.counts[i]) for i in mine):
            if (out / name).exists() and _record(out, name).exists():
                bar.update(count)
            else:
                encode_shard(engine, vae, Path(shards.location) / name, out, data=data, bar=bar)


def encode_shard(
    engine: Engine, vae: AutoencoderKL, shard: Path, out: Path, *, data: DataConfig, bar: tqdm[Any]
) -> None:
    """One image tar → one latent tar of the same name, and beside it what was measured in it."""
    statistics = MomentStatistics(int(vae.config["latent_channels"]))
    labels: Counter[int] = Counter()
    # A list, as a string would be brace-expanded; and the shards are shared out already, which webdataset must be told.
    reader = WebDataset([str(shard)], shardshuffle=False, nodesplitter=lambda urls: urls, empty_check=False)
    batches: Any = reader.batched(data.encode_batch_images, collation_fn=None, partial=True)
    with files.whole(out / shard.name) as aside:
        with aside.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for batch in batches:
                x = torch.from_numpy(np.stack([_pixels(shard, sample, data.image_size) for sample in batch]))
                with torch.no_grad(), engine.accelerator.autocast():
                    moments = encode_moments(vae, x.to(engine.device)).float().cpu()  # [B,2C,h,w]
                statistics.update(moments)
                for sample, of_sample in zip(batch, moments.numpy(), strict=True):
                    if "cls" in sample:
                        labels[_label(shard, sample)] += 1
                    kept = {
                        name: part
                        for name, part in sample.items()
                        if name in ("__key__", "cls", "txt", "json") and name not in images.PARTS
                    }
                    writer.write({**kept, latents.PART: latents.moments_to_bytes(of_sample)})
                bar.update(len(batch))
        # Before the tar takes its name: a tar that is there has its record.
        files.write_json(_record(out, shard.name), {"statistics": statistics.to_dict(), "labels": labels})


def _pixels(shard: Path, sample: dict[str, Any], size: int) -> Any:
    try:
        return images.to_unit(images.decode(image_part(sample), size))
    except ValueError as error:
        raise SampleError(f"{shard}: sample {sample['__key__']!r}: {error}") from None


def _label(shard: Path, sample: dict[str, Any]) -> int:
    try:
        return class_label(sample)
    except ValueError as error:
        raise SampleError(f"{shard}: sample {sample['__key__']!r}: {error}") from None


def _record(out: Path, name: str) -> Path:
    return out / "index" / f"{name.removesuffix('.tar')}.encoded.json"


def finish_set(shards: ShardSet, out: Path, origin: Origin) -> None:
    """Index the latents, add up what was measured, and say that the set is complete."""
    stray = sorted({path.name for path in out.glob("*.tar")} - set(shards.names))
    if stray:
        raise UsageError(f"{out}: holds {stray[0]}, which the images {shards.location} don't have; move it away")
    build_index(out, required=(frozenset({latents.PART}),), source=asdict(origin))
    written = ShardSet(out, open_shards=1)
    if written.counts != shards.counts:
        raise UsageError(
            f"{out}: has {len(written)} samples, the images {shards.location} have {len(shards)}; remove it"
        )
    labels: Counter[int] = Counter()
    records = [files.read_json(_record(out, name)) for name in shards.names]
    total = MomentStatistics.from_dict(records[0]["statistics"])
    for record in records[1:]:
        total.merge(MomentStatistics.from_dict(record["statistics"]))
    for record in records:
        labels.update({int(label): count for label, count in record["labels"].items()})
    with blame(str(out)):
        measured = total.latent_scale
    files.write_json(
        out / "dataset.json",
        {
            "format": latents.FORMAT,
            "kind": "latents",
            "complete": True,
            "fingerprint": written.fingerprint,
            "num_samples": len(written),
            "label_counts": {str(label): labels[label] for label in sorted(labels)},
            "origin": asdict(origin),
            "scale": measured.scale,
            "shift": measured.shift,
            "channel_mean": total.channel_mean,
            "channel_std": total.channel_std,
            "statistics": total.to_dict(),
        },
    )


if __name__ == "__main__":
    program.end(main())
