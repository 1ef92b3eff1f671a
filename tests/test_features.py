"""Feature networks from folders.  Pretrained weights can't be had here: all are small and random, and know nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captions import write_text_encoder
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.config_evaluation import FeaturesConfig
from pipeline.features import open_network
from pipeline.real_features import real_features, see_all

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}


def write(folder: Path, model: Any, **processor: Any) -> Path:
    model.save_pretrained(folder)
    if processor:
        CLIPImageProcessorPil(**processor).save_pretrained(folder)
    return folder


def dinov2(folder: Path, kind: Any = Dinov2Model) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(**SMALL, patch_size=14, mlp_ratio=2)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    return write(folder, kind(config), **sizes, image_mean=list(MEAN), image_std=list(STD), resample=3)


def clip(folder: Path) -> Path:
    torch.manual_seed(0)
    write_text_encoder(folder.with_name("words"))
    vision = {**SMALL, "intermediate_size": 16, "patch_size": 7}
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder.with_name("words") / "tokenizer")
    text = {**SMALL, "intermediate_size": 16, "vocab_size": len(words), "max_position_embeddings": 8}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    del text["image_size"]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    words.save_pretrained(folder)
    return write(folder, CLIPModel(config), size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def opened(network: str, path: Path | str, **stated: Any) -> Any:
    return open_network(FeaturesConfig(network=network, path=str(path), **stated), CPU)  # pyright: ignore[reportArgumentType]


def test_dinov2_gives_its_class_token_of_images_prepared_as_its_processor_says(tmp_path: Path) -> None:
    folder = dinov2(tmp_path / "dinov2")
    network = opened("transformers", folder)
    larger = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in IMAGES]  # 32 already: unchanged
    x = np.stack([np.asarray(image, dtype=np.float32)[2:30, 2:30] / 255 for image in larger])
    x = torch.from_numpy((x - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(folder).eval()(x).last_hidden_state[:, 0]
    found = network.see(IMAGES)
    assert found.probabilities is None and found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, wanted.numpy(), atol=2e-5)


def test_images_are_scaled_by_pillow_s_bicubic(tmp_path: Path) -> None:
    folder = dinov2(tmp_path / "dinov2")
    network = opened("transformers", folder, image_size=28, mean=MEAN, std=STD)
    assert network.description["preprocessing"] != opened("transformers", folder).description["preprocessing"]
    x = np.stack([np.asarray(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in IMAGES]) / 255
    x = torch.from_numpy(((x - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(folder).eval()(x).last_hidden_state[:, 0]
    np.testing.assert_allclose(network.see(IMAGES).features, wanted.numpy(), atol=2e-5)


def test_other_models_of_images(tmp_path: Path) -> None:
    """A convolutional one; a backbone's folder; a ViT whose pooler was never trained, which is passed over."""
    stated = {"image_size": 28, "mean": MEAN, "std": STD}
    torch.manual_seed(0)
    convolutional = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1]))
    network = opened("transformers", write(tmp_path / "convnext", convolutional), **stated)
    with pytest.raises(ValueError, match=r"does not take images \[5, 3, 28, 28\]: .*Kernel size"):
        network.see(IMAGES)
    larger = opened("transformers", tmp_path / "convnext", **stated | {"image_size": 64})
    assert larger.see(IMAGES).features.shape == (5, 12)
    backbone = opened("transformers", dinov2(tmp_path / "backbone", Dinov2Backbone))
    assert backbone.see(IMAGES).features.shape == (5, 16)
    vit = ViTModel(ViTConfig(**SMALL, intermediate_size=16, patch_size=7), add_pooling_layer=False)
    network = opened("transformers", write(tmp_path / "vit", vit), **stated)
    again = opened("transformers", tmp_path / "vit", **stated)
    assert not network.pools
    np.testing.assert_array_equal(network.see(IMAGES).features, again.see(IMAGES).features)
    assert network.description == again.description


def test_clip_projects_images_and_captions(tmp_path: Path) -> None:
    folder = clip(tmp_path / "clip")
    network = opened("clip", folder)
    captions = ["a nine", "a very long caption of more than eight tokens, which is cut off there", ""]
    model = CLIPModel.from_pretrained(folder).eval()
    prepared = CLIPImageProcessorPil.from_pretrained(folder)(images=list(IMAGES), return_tensors="pt")
    told = network.words(captions, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        both = model(**told, pixel_values=prepared["pixel_values"])
    for found, wanted in (
        (network.see(IMAGES).features, both.image_embeds),
        (network.read(captions), both.text_embeds),
    ):
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, wanted.numpy(), atol=2e-5)


def parts_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and those inside it."""
    return [config, *(config[name] for name in ("text_config", "vision_config") if name in config)]


@pytest.mark.parametrize(("network", "make"), [("transformers", dinov2), ("clip", clip)])
@pytest.mark.parametrize("values", [{"num_attention_heads": 4}, {"hidden_act": "relu"}])
def test_what_changes_features_changes_the_description(
    tmp_path: Path, network: str, make: Any, values: dict[str, Any]
) -> None:
    """The weights stay the same here; their shapes don't tell how many heads read them."""
    folder = make(tmp_path / "network")
    first = opened(network, folder)
    config = json.loads((folder / "config.json").read_text())
    for part in parts_of(config):
        part |= {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(network, folder).description == first.description
    for part in parts_of(config):
        part |= {key: value for key, value in values.items() if key in part}
    (folder / "config.json").write_text(json.dumps(config))
    other = opened(network, folder)
    assert np.abs(other.see(IMAGES).features - first.see(IMAGES).features).max() > 1e-4
    assert other.description != first.description
    if network == "transformers":
        assert other.describe_patches(28) != first.describe_patches(28)


def test_other_words_are_another_description(tmp_path: Path) -> None:
    """What captions' features depend on: the same network reads two words exchanged."""
    folder = clip(tmp_path / "clip")
    first = opened("clip", folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    cat, dog = (first.words.convert_ids_to_tokens(first.words(word).input_ids[1]) for word in ("cat", "dog"))
    vocabulary[cat], vocabulary[dog] = vocabulary[dog], vocabulary[cat]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    other = opened("clip", folder)
    assert not np.array_equal(first.read(["cat"]), other.read(["cat"]))
    assert other.description != first.description


def write_inception(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A file of random weights as FID's network holds them, 95 MB; skips where torch-fidelity can't be imported."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except Exception as error:  # a torchvision of another torch raises what it likes
        pytest.skip(f"torch-fidelity, the extra `fidelity`, can't be imported: {error}")

    class Drawn(FeatureExtractorInceptionV3):  # pyright: ignore[reportUntypedBaseClass]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Keep what was drawn."""

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn: Any = Drawn("drawn", ["2048"], feature_extractor_weights_path=str(path))
    state: dict[str, torch.Tensor] = drawn.state_dict()
    # As He et al. 2015 draw them, six times PyTorch's variance: else nothing is left of an image after 20 layers.
    weights = {name: value * 6**0.5 if value.ndim == 4 else value for name, value in state.items()}
    torch.save(weights, path)
    return weights


def test_inception_gives_pooled_features_and_probabilities_by_logits_without_bias(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    weights = write_inception(path, seed=0)
    network = opened("inception", path)
    found = network.see(IMAGES)
    assert found.features.shape == (5, 2048) and found.features.dtype == np.float32
    assert found.features.std(axis=0).max() > 1e-3, "all images look alike"
    logits = found.features.astype(np.float64) @ weights["fc.weight"].numpy().T.astype(np.float64)
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, likely / likely.sum(axis=1, keepdims=True), atol=1e-7)
    np.testing.assert_allclose(network.see(IMAGES[:1]).features, found.features[:1], rtol=1e-3, atol=1e-5)
    of_red, *_ = network.network(torch.from_numpy(IMAGES * np.uint8([1, 0, 0])).permute(0, 3, 1, 2))
    np.testing.assert_allclose(network.see(IMAGES * np.uint8([1, 0, 0])).features, of_red, rtol=1e-3, atol=1e-5)
    torch.save({**weights, "fc.weight": 2 * weights["fc.weight"]}, path)
    other = opened("inception", path)
    assert other.description != network.description
    assert np.abs(other.see(IMAGES[:1]).probabilities - found.probabilities[:1]).max() > 1e-5


def test_what_is_no_inception_says_why(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    weights = write_inception(path, seed=0)
    with pytest.raises(OSError, match="is no file; weights-inception"):
        opened("inception", tmp_path / "nothing.pth")
    torch.save({name: value for name, value in weights.items() if name != "fc.bias"}, path)
    with pytest.raises(ValueError, match="inception's weights can't be had"):
        opened("inception", path)
    torch.save(Path("a pickle of more than weights"), path)
    with pytest.raises(ValueError, match="holds no weights alone"):
        opened("inception", path)


def test_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    network = opened("transformers", dinov2(tmp_path / "dinov2"))
    one, many = (see_all(network, IMAGES, size, "")["features"] for size in (1, 5))
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_what_is_no_network_says_why(tmp_path: Path) -> None:
    folder = dinov2(tmp_path / "dinov2")
    with pytest.raises(OSError, match="there is no such folder"):
        opened("transformers", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"has no config\.json"):
        opened("transformers", tmp_path / "empty")
    with pytest.raises(OSError, match=r"has no tokenizer\.json"):
        opened("clip", clip_without_words(tmp_path))
    with pytest.raises(ValueError, match=r"does not open as a CLIPModel|lack"):
        opened("clip", folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"no preprocessor_config\.json; give image_size, mean and std"):
        opened("transformers", folder)
    opened("transformers", folder, image_size=28, mean=MEAN, std=STD)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="of the model's tensors, first"):
        opened("transformers", folder, image_size=28, mean=MEAN, std=STD)


def clip_without_words(tmp_path: Path) -> Path:
    folder = clip(tmp_path / "mute")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"network": "transformers"}, "wants a path"),
        ({"network": "classifier", "path": "x"}, "no path was wanted"),
        ({"network": "inception", "image_size": 299, "mean": MEAN, "std": STD}, "are for transformers and clip"),
        ({"network": "clip", "path": "x", "mean": MEAN}, "wanted together"),
        ({"network": "clip", "path": "x", "name": "a/b"}, "pattern"),
    ],
)
def test_settings_without_a_use_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FeaturesConfig.model_validate(values)


def test_real_features_are_looked_at_once(tmp_path: Path) -> None:
    looks: list[int] = []

    def look() -> dict[str, np.ndarray]:
        looks.append(1)
        return {"features": np.ones((3, 2), np.float32), "scale": np.array(2.0)}

    description = {"images": {"data": ["a"], "image_size": 8}, "network": {"weights": "b"}}
    first, again = (real_features(tmp_path, "net", description, look) for _ in range(2))
    assert len(looks) == 1 and first.fingerprint == again.fingerprint
    np.testing.assert_array_equal(first.features, again.features)
    other = real_features(tmp_path, "net", {**description, "network": {"weights": "c"}}, look)
    assert len(looks) == 2 and other.fingerprint != first.fingerprint
