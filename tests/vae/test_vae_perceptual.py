"""The distance is the paper's formula over a frozen network's features, and its gradient reaches the image alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from vae.perceptual import EPS, AlexNetLayers, HiddenStates, Perceptual, open_perceptual

TOKENS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = {"resnet": 0, "vit": 1, "dinov2": 5}  # tokens of no patch: the class, four registers
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def network(kind: str) -> Any:
    """A small random one, drawn anew the same each time."""
    torch.manual_seed(0)
    match kind:
        case "resnet":
            shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
            return ResNetForImageClassification(shape)  # as microsoft/resnet-18 is, with a head
        case "vit":
            return ViTForImageClassification(ViTConfig(**TOKENS))  # no pooler, which the base model has
        case _:
            return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TOKENS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, as save_pretrained writes it; the ResNet with a preprocessor beside it."""
    root = tmp_path_factory.mktemp("backbones")
    for kind in SPECIAL:
        network(kind).save_pretrained(root / kind)
    (root / "resnet" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return {kind: root / kind for kind in SPECIAL}


@pytest.fixture(params=SPECIAL)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def perceptual(kind: str, folders: dict[str, Path]) -> Perceptual:
    return open_perceptual(str(folders[kind]))


def pair(num_images: int, *sides: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x_hat near x, both within [-1, 1]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(num_images, 3, *sides, generator=generator, dtype=dtype) * 1.6 - 0.8
    return x + 0.05 * torch.randn(x.shape, generator=generator, dtype=dtype), x


def direct(kind: str, x_hat: Tensor, x: Tensor) -> float:
    """Eq. 1 in loops over layers, positions and channels, of one image pair; the network is called by hand."""
    model = network(kind).eval().double()
    mean, std = (MEAN, STD) if kind == "resnet" else ([0.5] * 3, [0.5] * 3)

    def states(image: Tensor) -> list[Tensor]:
        pixels = torch.stack([((image[c].double() + 1) / 2 - mean[c]) / std[c] for c in range(3)])
        extra = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        found = model(pixels[None], output_hidden_states=True, **extra).hidden_states
        if kind == "resnet":
            return [state[0].permute(1, 2, 0).reshape(-1, state.shape[1]) for state in found]  # [P,C]
        return [state[0, SPECIAL[kind] :] for state in found]

    with torch.no_grad():
        layers = list(zip(states(x_hat), states(x), strict=True))
    total = 0.0
    for y_hat, y in layers:
        of_layer = 0.0
        for a, b in zip(y_hat.tolist(), y.tolist(), strict=True):
            norms = [math.sqrt(sum(value * value for value in values)) for values in (a, b)]
            of_layer += sum((p / norms[0] - q / norms[1]) ** 2 for p, q in zip(a, b, strict=True))
        total += of_layer / len(y)
    return total / len(layers)


def test_the_distance_is_the_formula(kind: str, perceptual: Perceptual) -> None:
    """At the size the network knows, at a larger one, and where sides differ."""
    for sides in ((32, 32), (48, 48), (24, 40)):
        x_hat, x = pair(3, *sides)
        found = perceptual.distance(x_hat, x)
        wanted = [direct(kind, a, b) for a, b in zip(x_hat, x, strict=True)]
        assert found.shape == (3,) and found.dtype == torch.float32
        assert found.tolist() == pytest.approx(wanted, rel=1e-3) and min(wanted) > 1e-4


def test_zero_at_equal_images_and_symmetric_to_the_last_bit(perceptual: Perceptual) -> None:
    x_hat, x = pair(2, 32, 32)
    x_hat.requires_grad_()
    assert torch.equal(perceptual.distance(x, x), torch.zeros(2))
    assert torch.equal(perceptual.distance(x_hat, x), perceptual.distance(x, x_hat))


def test_it_grows_with_the_noise_and_ends(perceptual: Perceptual) -> None:
    x_hat, x = pair(2, 32, 32)
    found = torch.stack([perceptual.distance(x + times * (x_hat - x), x) for times in (0.25, 1, 4, 400)])
    assert (found.diff(dim=0) > 0).all() and found.max() < 4


def test_the_gradient_is_that_of_finite_differences(perceptual: Perceptual) -> None:
    perceptual.double()
    x_hat, x = pair(2, 16, 16, dtype=torch.float64)
    x_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(perceptual.distance(x_hat, x).sum(), x_hat)
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-6 * direction
        ends = [perceptual.distance(x_hat.detach() + sign * step, x).sum().item() for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_the_gradient_reaches_one_image_and_no_weight(perceptual: Perceptual) -> None:
    x_hat, x = pair(2, 32, 32)
    x_hat.requires_grad_()
    x.requires_grad_()
    perceptual.distance(x_hat, x).sum().backward()
    assert x.grad is None and all(weight.grad is None for weight in perceptual.parameters())
    assert x_hat.grad is not None and (x_hat.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_gradient_is_finite_where_nothing_is_seen() -> None:
    """Features are 0 after rectifiers that let nothing through: the norm's own derivative is infinite there."""

    class Rectified(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.flatten(2).relu()]

    perceptual = Perceptual(Rectified(), mean=[0.5] * 3, std=[0.5] * 3, smallest_side=1)
    x_hat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    distance = perceptual.distance(x_hat + 0.0, torch.full((1, 3, 4, 4), 0.5))
    distance.sum().backward()
    assert distance.item() == pytest.approx(1) and x_hat.grad is not None and x_hat.grad.isfinite().all()
    assert torch.finfo(torch.float32).tiny < EPS


def test_frozen_and_in_eval_mode_for_good(perceptual: Perceptual) -> None:
    x_hat, x = pair(2, 32, 32)
    before = {name: value.clone() for name, value in perceptual.state_dict().items()}
    first = perceptual.distance(x_hat, x)
    nn.Sequential(perceptual).train()
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(weight.requires_grad for weight in perceptual.parameters())
    assert torch.equal(perceptual.distance(x_hat, x), first)
    after = perceptual.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_no_image_sees_another(perceptual: Perceptual) -> None:
    x_hat, x = pair(3, 32, 32)
    alone = torch.cat([perceptual.distance(*one) for one in zip(x_hat.split(1), x.split(1), strict=True)])
    assert torch.allclose(perceptual.distance(x_hat, x), alone, rtol=1e-4, atol=0)


def test_the_network_follows_autocast_and_the_differences_do_not(perceptual: Perceptual) -> None:
    x_hat, x = pair(4, 32, 32)
    exact = perceptual.distance(x_hat, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, features = perceptual.distance(x_hat, x), perceptual.features(x)
        assert torch.equal(perceptual.distance(x, x), torch.zeros(4))
    assert found.dtype == features.dtype == torch.float32
    assert torch.allclose(found, exact, rtol=0.1, atol=0) and not torch.equal(found, exact)
    assert perceptual.distance(x_hat.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_features_are_means_over_the_last_layers_positions(kind: str, perceptual: Perceptual) -> None:
    _, x = pair(3, 40, 32)
    x.requires_grad_()
    found = perceptual.features(x)
    last = perceptual.layers((x - perceptual.shift) / perceptual.scale)[-1]
    assert last.shape == (3, 16, 5 * 4), "a position for each 8 × 8 pixels, and none for the class or a register"
    assert not found.requires_grad and found.dtype == torch.float32
    assert torch.equal(found, last.mean(dim=2))


def test_opened_again_the_same_and_no_generator_moves(kind: str, folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    first = open_perceptual(str(folders[kind]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    again = open_perceptual(str(folders[kind])).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert {value.dtype for value in again.values() if value.is_floating_point()} == {torch.float32}


def test_weights_in_half_precision_are_opened_as_fp32(tmp_path: Path) -> None:
    network("resnet").half().save_pretrained(tmp_path)
    assert {weight.dtype for weight in open_perceptual(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({}, [0.5] * 3, [0.5] * 3),
        ({"image_mean": MEAN, "image_std": STD}, MEAN, STD),
        ({"do_normalize": False, "image_mean": MEAN, "image_std": STD}, [0.0] * 3, [1.0] * 3),
    ],
)
def test_the_networks_own_normalisation(said: dict[str, Any], mean: Any, std: Any, tmp_path: Path) -> None:
    network("resnet").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    perceptual = open_perceptual(str(tmp_path))
    x = pair(2, 16, 16)[1]
    by_hand = ((x + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose((x - perceptual.shift) / perceptual.scale, by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"do_flip_channel_order": True}, "wants BGR"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "RGB is wanted"),
        ({"image_mean": MEAN, "image_std": [0, 1, 1]}, "RGB is wanted"),
    ],
)
def test_a_normalisation_of_other_images_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    network("resnet").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        open_perceptual(str(tmp_path))


def test_images_it_cannot_see_are_refused(perceptual: Perceptual) -> None:
    assert perceptual.smallest_side == 8
    assert perceptual.distance(*pair(2, 8, 8)).shape == (2,)
    for x in (torch.zeros(2, 3, 7, 32), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match=r"came to the perceptual network, .* sides of at least 8 are wanted"):
            perceptual.features(x)
    with pytest.raises(ValueError, match=r"\[2, 3, 16, 16\] came, \[2, 3, 32, 32\] is wanted"):
        perceptual.distance(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 32, 32))


def test_what_is_no_folder_is_named_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for missing in ("models/resnet", "./resnet", "resnet", str(tmp_path / "resnet")):
        with pytest.raises(FileNotFoundError, match="there is no such folder") as caught:
            open_perceptual(missing)
        assert repr(missing) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_perceptual("models")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_a_hub_id_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'org/name' came, which is no folder here, and the hub gave") as caught:
        open_perceptual("org/name")
    assert "\n" not in str(caught.value)


def test_a_pickle_stays_closed(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["resnet"] / "config.json").read_bytes())
    torch.save(network("resnet").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; pickles, which may run code"):
        open_perceptual(str(tmp_path))


def without_one(weights: dict[str, Tensor]) -> None:
    del weights["resnet.embedder.embedder.convolution.weight"]


def with_another_shape(weights: dict[str, Tensor]) -> None:
    weights["resnet.embedder.embedder.convolution.weight"] = torch.zeros(4, 3, 7, 7)


@pytest.mark.parametrize("damage", [without_one, with_another_shape])
def test_weights_that_do_not_fit_are_refused(damage: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    network("resnet").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"don't fit the config\.json|does not open"):
        open_perceptual(str(tmp_path))


def test_cut_weights_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    network("resnet").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="does not open"):
        open_perceptual(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    with pytest.raises(ValueError, match="does not open"):
        open_perceptual(str(tmp_path))


def test_a_model_that_reads_is_refused(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    BertModel(BertConfig(hidden_size=16, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not take images \[2, 3, 224, 224\]"):
        open_perceptual(str(tmp_path))


def test_a_model_that_draws_is_refused(tmp_path: Path) -> None:
    ViTMAEModel(ViTMAEConfig(**TOKENS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different features each time"):
        open_perceptual(str(tmp_path))


def test_hidden_states_of_no_known_form_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = object()

        def forward(self, x: Tensor, output_hidden_states: bool) -> Any:
            return type("Output", (), {"hidden_states": (x.flatten(1),) if x.shape[0] > 1 else ()})()

    for num_images, came in ((2, r"\[\[2, 192\]\]"), (1, "none")):
        with pytest.raises(ValueError, match=f"'flat': hidden states {came} came"):
            HiddenStates(Flat(), "flat")(torch.zeros(num_images, 3, 8, 8))


def test_learned_weights_are_those_of_the_channels() -> None:
    """As LPIPS has them: a sum over layers, each channel's squared difference by its own weight."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x[:, :2, ::2, ::2]]

    weights = [torch.tensor([0.5, 0.0, 2.0]), torch.tensor([1.0, 3.0])]
    perceptual = Perceptual(
        AlexNetLayers(Two()), mean=[0.5] * 3, std=[0.5] * 3, smallest_side=1, channel_weights=weights
    )
    x_hat, x = pair(2, 4, 4)
    wanted = torch.zeros(2)
    for y_hat, y, weight in ((x_hat, x, weights[0]), (x_hat[:, :2, ::2, ::2], x[:, :2, ::2, ::2], weights[1])):
        unit_hat, unit = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (y_hat, y))
        wanted += ((unit_hat - unit).square() * weight.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
    assert torch.allclose(perceptual.distance(x_hat, x), wanted, rtol=1e-5, atol=0)
    assert not any(weight.requires_grad for weight in perceptual.parameters())


@pytest.mark.skipif(find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_is_an_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install latent-diffusion-pipeline\[lpips\]"):
        open_perceptual("lpips")


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:.*weight enum.*:UserWarning")
def test_lpips_is_the_packages_own_distance() -> None:
    """With an AlexNet of random weights, for the trained ones are a download; the layers' weights are the package's."""
    lpips = pytest.importorskip("lpips")
    from vae.perceptual import _open_lpips  # pyright: ignore[reportPrivateUsage]

    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    torch.manual_seed(0)
    ours = _open_lpips(pnet_rand=True)
    for side in (ours.smallest_side, 64):
        x_hat, x = pair(3, side, side)
        assert torch.allclose(ours.distance(x_hat, x), theirs(x_hat, x).flatten(), rtol=1e-4, atol=0)
    assert ours.features(x).shape == (3, 256)
    with pytest.raises(ValueError, match="sides of at least 31"):
        ours.features(x[..., :30, :30])
