"""What a perceptual and an adversarial term add to an autoencoder that was trained on the pixel error alone.

    python benchmarks/finetune.py [--seeds 3] [--base-steps 2000] [--steps 600] [--folder FOLDER] [--sheet FILE.png]

Emoji at 64 pixels, f8, four latent channels.  From one common checkpoint, trained on the square error, each seed goes
on for as many steps with the square error, and with perceptual and adversarial terms beside it.  Lower Fréchet distance
between all emoji and their reconstructions is better; PSNR is given.

No pretrained network is needed: the perceptual backbone is a ResNet that tells single emoji from one another under
crops, shades and noise; the features of the distance are those of a RegNet that knows the words of their names,
trained apart.  Neither saw a reconstruction.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fresh_clone import figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import RegNetConfig, RegNetModel, ResNetConfig, ResNetModel
from verbs import ROOT, run

from pipeline.data.dataset import read_images
from pipeline.data.images import to_unit
from pipeline.metrics.distances import frechet_distance
from vae.metrics import psnr, reconstruct
from vae.model import load

CONFIG = ROOT / "configs" / "emoji_text.yaml"
SIZE = 64  # pixels
NUM_WORDS = 128  # the most frequent ones of the names
EPOCHS = 25
Loss = Callable[[Tensor, Tensor], Tensor]
WORDS = [
    f"data.image_size={SIZE}",
    "vae.model.block_out_channels=[16,32,32,64]",
    "vae.model.latent_channels=4",
    "vae.train.global_batch_images=8",
    "checkpoint.every_steps=200",
]
TERMS = {
    "pixel error alone": [],
    "perceptual and adversarial": [
        "vae.train.perceptual={backbone: backbone, weight: 0.1}",
        "vae.train.adversary={weight: 0.2, discriminator: {base_channels: 32, num_downsamplings: 2}}",
    ],
}


def main() -> None:
    """Train all, then compare."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--base-steps", type=int, default=2000, help="of the common checkpoint")
    made.add_argument("--steps", type=int, default=600, help="of each that goes on from it")
    made.add_argument("--folder", type=Path, help="where to work, and to go on (default: a temporary one)")
    made.add_argument("--sheet", type=Path, help="write originals and reconstructions of seed 0 there")
    args = made.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder, args.seeds, args.base_steps, args.steps, args.sheet)


def compare(folder: Path, num_seeds: int, base_steps: int, steps: int, picture: Path | None) -> None:
    """Print the figures."""
    run(folder, "prepare", "emoji", "data/emoji", "--size", str(SIZE), "--validation", "0.089")
    sets = [read_images(folder / "data/emoji" / part, size=SIZE, limit=10_000) for part in ("train", "validation")]
    captions = [caption for each in sets for caption in each.captions or []]
    x = torch.from_numpy(to_unit(np.concatenate([each.pixels for each in sets])))  # [N,3,H,W]
    if not (folder / "backbone").exists():
        train_backbone(x[: len(sets[0].pixels)]).save_pretrained(folder / "backbone")
    features = train_features(x[: len(sets[0].pixels)], captions[: len(sets[0].pixels)])

    if not (folder / "base/autoencoder").exists():
        run(folder, "train-vae", str(CONFIG), *WORDS, f"vae.train.steps={base_steps}", "vae.run_dir=base")
    real = features(x)
    shown: list[Tensor] = []

    def scored(name: str, run_dir: str) -> tuple[float, float]:
        vae = load(folder / run_dir / "autoencoder")
        x_hat = torch.cat([reconstruct(vae, part) for part in x.split(64)]).clamp(-1, 1)
        if run_dir in ("base", *(f"{term.replace(' ', '-')}-0" for term in TERMS)):
            shown.append(x_hat)
        distance, decibels = frechet_distance(real, features(x_hat)), float(psnr(x_hat, x).mean())
        print(f"{name}: Fréchet distance {distance:.4f}, {decibels:.2f} dB", flush=True)
        return distance, decibels

    before = scored("common checkpoint", "base")
    distances: dict[str, list[float]] = {}
    for term, words in TERMS.items():
        found: list[tuple[float, float]] = []
        for seed in range(num_seeds):
            run_dir = f"{term.replace(' ', '-')}-{seed}"
            if not (folder / run_dir / "autoencoder").exists():
                run(
                    folder,
                    "train-vae",
                    str(CONFIG),
                    *WORDS,
                    *words,
                    f"seed={seed + 1}",
                    "vae.train.start_from=base/autoencoder",
                    f"vae.train.steps={steps}",
                    "vae.train.learning_rate=3e-4",
                    f"vae.run_dir={run_dir}",
                )
            found.append(scored(f"{term}, seed {seed}", run_dir))
        distances[term] = [distance for distance, _ in found]
        spread = " ".join(f"{distance:.3f}" for distance in distances[term])
        figure(
            f"emoji f8: {term}: Fréchet distance of reconstructions, seeds: {spread}",
            statistics.mean(distances[term]),
            None,
            "of 128 features",
        )
        figure(
            f"emoji f8: {term}: reconstructions", statistics.mean(decibels for _, decibels in found), None, "dB PSNR"
        )
    plain, full = distances.values()
    figure("emoji f8: the common checkpoint: Fréchet distance", before[0], None, "of 128 features")
    figure("emoji f8: the common checkpoint: reconstructions", before[1], None, "dB PSNR")
    better = sum(b < a for a, b in zip(plain, full, strict=True))
    figure(f"emoji f8: seeds of {num_seeds} in which the terms are better", better, f">= {num_seeds}", "seeds")
    if picture:
        sheet(picture, [x, *shown])


# Networks of features ------------------------------------------------------------------------------


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to 6 pixels, of another brightness and contrast, with noise.  x [B,3,H,W]."""
    padded = functional.pad(x, (6, 6, 6, 6), mode="replicate")
    down, right = (int(i) for i in torch.randint(0, 13, (2,), generator=generator))
    moved = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
    contrast = 0.7 + 0.6 * torch.rand(len(x), 1, 1, 1, generator=generator)
    shade = 0.4 * torch.rand(len(x), 3, 1, 1, generator=generator) - 0.2
    noise = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return moved * contrast + shade + noise * torch.randn(x.shape, generator=generator)


def fit(
    logits: Callable[[Tensor], Tensor],
    weights: list[nn.Parameter],
    x: Tensor,
    targets: Tensor,
    *,
    loss: Loss,
    seed: int,
) -> None:
    """EPOCHS over the images x [N,3,H,W] and their targets, with AdamW."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05)
    steps = EPOCHS * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // 32 * 32].view(-1, 32):
            found = loss(logits(augmented(x[rows], generator)), targets[rows])
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            schedule.step()


def train_backbone(x: Tensor) -> ResNetModel:
    """A ResNet that says which emoji it is."""
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    network, head = ResNetModel(shape).train(), nn.Linear(128, len(x))

    def logits(part: Tensor) -> Tensor:
        return head(network(part).pooler_output.flatten(1))

    weights = [*network.parameters(), *head.parameters()]
    fit(logits, weights, x, torch.arange(len(x)), loss=functional.cross_entropy, seed=0)
    return network.eval()


def train_features(x: Tensor, captions: list[str]) -> Callable[[Tensor], NDArray[np.float32]]:
    """The last features of a RegNet that says which frequent words an emoji's name has: [N,3,H,W] → [N,128]."""
    torch.manual_seed(1)
    names = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
    words = [word for word, _ in Counter(word for name in names for word in name).most_common(NUM_WORDS)]
    targets = torch.tensor([[float(word in name) for word in words] for name in names])
    shape = RegNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=16, layer_type="x"
    )
    network, head = RegNetModel(shape).train(), nn.Linear(128, len(words))

    def pooled(part: Tensor) -> Tensor:
        return network(part).pooler_output.flatten(1)

    weights = [*network.parameters(), *head.parameters()]
    loss = functional.binary_cross_entropy_with_logits
    fit(lambda part: head(pooled(part)), weights, x, targets, loss=loss, seed=1)
    network.eval()

    @torch.no_grad()
    def features(images: Tensor) -> NDArray[np.float32]:
        return torch.cat([pooled(part) for part in images.split(64)]).numpy()

    with torch.no_grad():
        found = torch.cat([head(pooled(part)) for part in x.split(64)])
    first = (found.argmax(dim=1)[:, None] == torch.arange(len(words))).float()
    print(
        f"the RegNet's surest word is one of the name's for {float((first * targets).sum() / len(x)):.0%}", flush=True
    )
    return features


def sheet(path: Path, sets: list[Tensor]) -> None:
    """A row of sixteen emoji from each set, in turn."""
    chosen = torch.linspace(0, len(sets[0]) - 1, 32).long()
    rows = [torch.cat(list(each[part]), dim=2) for part in chosen.view(2, 16) for each in sets]
    pixels = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()
