"""The networks whose features images are compared in: opened once, frozen, with a description of all they depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor
from torch.nn import Module

from pipeline import files
from pipeline.config_evaluation import FeaturesConfig
from pipeline.metrics.classifier import ImageClassifier
from pipeline.text import Tokenizers
from vae.model import state_sha256
from vae.pretrained import HUB_ID, open_transformers

HUB_FILES = ("*.json", "*.txt", "model*.safetensors")  # of a hub id: no pickles, and no code
INCEPTION_OUTPUTS = ["2048", "logits_unbiased"]  # FID's features; Inception Score's logits, without their bias
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # FID's weights, as torch-fidelity published them
NOT_OF_THE_NETWORK = ("transformers_version", "architectures", "dtype", "torch_dtype")  # of config.json's keys

Images = NDArray[np.uint8]  # [N,H,W,3]


class Seen(NamedTuple):
    """What a network says of N images."""

    features: NDArray[np.float32]  # [N,D]
    probabilities: NDArray[np.float32] | None  # [N,K]; None: it names no classes


class FeatureNetwork(Protocol):
    """Images → features."""

    @property
    def description(self) -> dict[str, Any]:
        """JSON of all that its features depend on, beside the images."""
        ...

    def see(self, images: Images) -> Seen:
        """uint8 [N,H,W,3], not more than one batch.  Raises ValueError for what it can't take."""
        ...


def open_network(settings: FeaturesConfig, device: torch.device) -> FeatureNetwork:
    """A pretrained one, on its device; nothing is fetched but from a hub id, or for `inception`.

    Raises ImportError, OSError and ValueError where it is missing or of another kind.
    """
    match settings.network:
        case "inception":
            return Inception(settings.path, device)
        case "transformers":
            return Backbone(settings, device)
        case "clip":
            return Clip(settings, device)
        case "classifier":
            raise ValueError("the classifier is fitted, not opened")


class Classifier:
    """The small classifier, fitted on the training images of which `data` tells."""

    def __init__(self, fitted: ImageClassifier, data: dict[str, Any]) -> None:
        self.fitted, self.data = fitted, data

    @staticmethod
    def described(data: dict[str, Any], seed: int) -> dict[str, Any]:
        """Its description is known before it is fitted."""
        return {"network": "classifier", "seed": seed, "fitted_on": data}

    @property
    def description(self) -> dict[str, Any]:
        """See FeatureNetwork."""
        return self.described(self.data, self.fitted.seed)

    def see(self, images: Images) -> Seen:
        """See FeatureNetwork."""
        return Seen(self.fitted.features(images), self.fitted.probabilities(images).astype(np.float32))


class Inception:
    """Inception v3 as FID has it (Heusel et al. 2017): the 2,048 pooled activations of TensorFlow's network of 2015."""

    def __init__(self, path: str | None, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except Exception as error:  # a torchvision of another torch raises what it likes
            raise ImportError(
                f"inception came, and torch-fidelity can't be imported ({_first(error)}); pip install "
                "latent-diffusion-pipeline[fidelity], or name another network"
            ) from error
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"inception's path {path!r} is no file; {INCEPTION_FILE} is wanted")
        try:
            if path is not None:
                torch.load(path, weights_only=True)  # torch-fidelity would open a pickle that runs code, too
        except Exception as error:  # of whatever a file holds
            raise ValueError(f"inception's path {path!r} holds no weights alone; {INCEPTION_FILE} is wanted") from error
        try:
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", INCEPTION_OUTPUTS, feature_extractor_weights_path=path, verbose=False
            )
        except Exception as error:  # no network, or a file of something else
            raise ValueError(
                f"inception's weights can't be had ({_first(error)}); give path: the file {INCEPTION_FILE} of "
                "torch-fidelity's releases"
            ) from error
        Module.to(network, device)
        self.network, self.device = network.eval().requires_grad_(False), device
        weights = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        self.description = {"network": "inception", "weights_sha256": state_sha256(weights)}

    @torch.no_grad()
    def see(self, images: Images) -> Seen:
        """See FeatureNetwork.  It scales them to 299 pixels itself, as TensorFlow 1 did."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)  # uint8 [B,3,H,W]
        features, logits = self.network(x)
        return Seen(features.float().cpu().numpy(), softmax(logits.double().cpu().numpy(), axis=1).astype(np.float32))


class Backbone:
    """A transformers model of images: what it pools (DINOv2: its class token), else the mean of its last features.

    Where it has features of an image's patches, these can be had, too.
    """

    def __init__(self, settings: FeaturesConfig, device: torch.device) -> None:
        from transformers import AutoModel

        folder = _folder(settings)
        network, missing = open_transformers(AutoModel, folder, str(folder))
        self.network = getattr(network, "vision_model", network)  # CLIP and SigLIP read as well as see
        self.pools = not any("pooler." in name for name in missing)
        _refuse_missing([name for name in missing if "pooler." not in name], folder)
        Module.to(self.network, device)
        self.processor, self.device = _processor(settings, folder), device
        weights = self.network.state_dict()
        read = {name: weight for name, weight in weights.items() if self.pools or "pooler." not in name}
        self.description = {
            "network": "transformers",
            "weights_sha256": state_sha256(read),
            "config_sha256": _config_sha256(folder),
            "pools": self.pools,
            "preprocessing": _told(self.processor),
        }

    def see(self, images: Images) -> Seen:
        """See FeatureNetwork."""
        output = self._output(_prepared(self.processor, images, self.device))
        features = getattr(output, "pooler_output", None) if self.pools else None
        if features is None:
            last = output.last_hidden_state  # [B,N,D] or [B,D,h,w]
            features = last.mean(dim=1) if last.ndim == 3 else last.flatten(2)
        features = features.flatten(1) if features.ndim != 3 else features.mean(dim=2)
        return Seen(features.float().cpu().numpy(), None)

    def patches(self, images: Images) -> NDArray[np.float32]:
        """The last features of each patch, row by row: uint8 [N,H,W,3], square, not more than one batch → [N,P,D].

        Tokens of patches come last, behind class, distillation and register tokens.  Raises ValueError where the
        network has no square grid of them.
        """
        x = _prepared(self.processor, images, self.device)
        last = self._output(x).last_hidden_state  # [B,tokens,D] or [B,D,h,w]
        if last.ndim == 4:
            height, width = last.shape[2:]
            last = last.flatten(2).transpose(1, 2)
        else:
            size: Any = getattr(self.network.config, "patch_size", None)
            if not isinstance(size, int):
                raise ValueError(f"its config.json has patch_size: {size}; a network of square patches was wanted")
            height, width = (side // size for side in x.shape[2:])
        count = height * width
        if height != width or not 0 < count <= last.shape[1]:
            raise ValueError(
                f"{last.shape[1]} features of an image came, where its patches make {height} rows of {width}; one "
                "feature for each patch of a square was wanted, such as a ViT's or a ResNet's"
            )
        return last[:, -count:].float().cpu().numpy()

    def describe_patches(self, image_size: int) -> dict[str, Any]:
        """JSON of all that features of patches depend on, beside the images of this size: `side`² of `width` each."""
        _, count, width = self.patches(np.zeros((1, image_size, image_size, 3), dtype=np.uint8)).shape
        kept = {name: self.description[name] for name in ("weights_sha256", "config_sha256", "preprocessing")}
        return json.loads(json.dumps({**kept, "side": math.isqrt(count), "width": width}))

    @torch.no_grad()
    def _output(self, x: Tensor) -> Any:
        try:
            return self.network(pixel_values=x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the network does not take images {list(x.shape)}: {_first(error)}") from error


class Clip:
    """A CLIPModel: its projections of images, and of captions."""

    def __init__(self, settings: FeaturesConfig, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        folder = _folder(settings)
        network, missing = open_transformers(CLIPModel, folder, str(folder))
        _refuse_missing(missing, folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"{folder} has no tokenizer.json or vocab.json, which captions are read by")
        self.words: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        Module.to(network, device)
        self.network, self.device = network, device
        self.processor = _processor(settings, folder)
        self.description = {
            "network": "clip",
            "weights_sha256": state_sha256(network.state_dict()),
            "config_sha256": _config_sha256(folder),
            "words_sha256": Tokenizers((self.words,)).sha256(),
            "preprocessing": _told(self.processor),
        }

    @torch.no_grad()
    def see(self, images: Images) -> Seen:
        """See FeatureNetwork."""
        output: Any = self.network.get_image_features(pixel_values=_prepared(self.processor, images, self.device))
        return Seen(_pooled(output), None)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions, not more than one batch → [N,D]; those that are too long are cut off."""
        longest = self.network.config.text_config.max_position_embeddings
        told = self.words(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return _pooled(self.network.get_text_features(**told.to(self.device)))


# Folders of transformers --------------------------------------------------------------------------


def _folder(settings: FeaturesConfig) -> Path:
    """Where the model's files lie: the folder itself, or what the hub sent."""
    path = str(settings.path)
    folder = Path(path).expanduser()
    if not folder.exists():
        if not HUB_ID.fullmatch(path) or folder.parent.exists():
            raise FileNotFoundError(f"path {path!r} came, and there is no such folder; a transformers model is wanted")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, allow_patterns=[*HUB_FILES]))
        except OSError as error:
            raise FileNotFoundError(
                f"path {path!r} came, which is no folder here, and the hub gave no model ({_first(error)}); correct "
                "the name, or download it first"
            ) from error
    for name, wanted in (("config.json", "config.json"), ("model.safetensors", "model*.safetensors")):
        if not any(folder.glob(wanted)):
            raise FileNotFoundError(f"{folder} has no {name}; a folder that save_pretrained wrote is wanted")
    return folder


def _refuse_missing(missing: Sequence[str], folder: Path) -> None:
    if missing:
        raise ValueError(f"the weights in {folder} lack {len(missing)} of the model's tensors, first {missing[0]}")


def _config_sha256(folder: Path) -> str:
    """Of what config.json says of the network: heads, activations and the like show in no weight's shape."""
    return files.fingerprint(_of_network(files.read_json(folder / "config.json")))


def _of_network(said: dict[str, Any]) -> dict[str, Any]:
    """Without paths, versions, and the type of its weights, which are opened in fp32."""
    kept = {key: value for key, value in said.items() if not key.startswith("_") and key not in NOT_OF_THE_NETWORK}
    return {key: _of_network(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _processor(settings: FeaturesConfig, folder: Path) -> Any:
    """What scales and normalises images: on Pillow, which gives the same numbers wherever it runs."""
    from transformers import AutoImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if settings.image_size is not None and settings.mean is not None and settings.std is not None:
        return CLIPImageProcessorPil(
            size={"shortest_edge": settings.image_size},
            do_center_crop=False,
            resample=3,  # Pillow's bicubic
            image_mean=list(settings.mean),
            image_std=list(settings.std),
        )
    if not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json; give image_size, mean and std beside path")
    return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, backend="pil")


def _told(processor: Any) -> dict[str, Any]:
    """What a processor does, without what names its class and version."""
    said: dict[str, Any] = processor.to_dict()
    return {key: said[key] for key in sorted(said) if key.startswith(("do_", "image_", "size", "crop", "res"))}


def _prepared(processor: Any, images: Images, device: torch.device) -> Tensor:
    """uint8 [N,H,W,3] → as the network wants it, fp32 [N,3,h,w]."""
    prepared: Any = processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
    return prepared["pixel_values"].to(device, torch.float32)


def _pooled(output: Any) -> NDArray[np.float32]:
    """transformers 5 gives the projections inside an output, 4 gave them alone."""
    found = output if isinstance(output, Tensor) else output.pooler_output
    return found.float().cpu().numpy()


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
