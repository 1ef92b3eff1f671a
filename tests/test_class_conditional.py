"""The pipeline: labels, guidance of every sort, images to start from, any fitting scheduler, what it refuses."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from small_pipe import small_pipe
from torch import Tensor

from pipeline import class_conditional
from pipeline.asking import scheduler_like
from pipeline.class_conditional import ClassConditionalPipeline, lent, rescaled
from pipeline.config_diffusion import DiffusionConfig

LABELS, SEEDS = [0, 2], [3, 4]


@pytest.fixture
def learned() -> Any:
    pipe = small_pipe(channels_out=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **words: Any) -> Tensor:
    words = {"num_inference_steps": 4, "output_type": "latent", "seeds": SEEDS, "guidance_scale": 3.0} | words
    return pipe(LABELS, **words).images


def test_ddim_draws_as_if_the_variance_had_been_cut_off(learned: Any) -> None:
    whole = latents(learned)
    unet = learned.unet
    unet.conv_out.weight, unet.conv_out.bias = (torch.nn.Parameter(p[:4]) for p in unet.conv_out.parameters())
    unet.register_to_config(out_channels=4)
    torch.testing.assert_close(latents(learned), whole)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_ancestral_steps_get_the_conditions_own_variance(learned: Any, w: float) -> None:
    learned.scheduler = DDPMScheduler.from_config(learned.scheduler.config, variance_type="learned_range")
    given: list[Tensor] = []
    step = learned.scheduler.step

    def spy(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(prediction)
        return step(prediction, *args, **kwargs)

    learned.scheduler.step = spy
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents(learned, guidance_scale=w, latents=start, seeds=SEEDS, num_inference_steps=1)
    condition = {"encoder_hidden_states": torch.zeros(2, 1, 8)}
    t = learned.scheduler.timesteps[0]
    c, u = (
        learned.unet(start, t, class_labels=torch.tensor(labels), **condition).sample for labels in (LABELS, [3, 3])
    )
    prediction, variance = given[0].chunk(2, dim=1)
    wanted = u + w * (c - u) if w not in {0.0, 1.0} else (c if w else u)
    torch.testing.assert_close(prediction, wanted[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, (u if w == 0 else c)[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_used_by_ancestral_steps_and_not_by_ddim(learned: Any) -> None:
    config = learned.scheduler.config
    drawn: dict[str, list[Tensor]] = {}
    for name, scheduler in {
        "ddim": DDIMScheduler.from_config(config),
        "learned": DDPMScheduler.from_config(config, variance_type="learned_range"),
        "small": DDPMScheduler.from_config(config, variance_type="fixed_small"),
    }.items():
        learned.scheduler = scheduler
        before = latents(learned)
        with torch.no_grad():
            learned.unet.conv_out.bias[4:] += 5.0
        drawn[name] = [before, latents(learned)]
        with torch.no_grad():
            learned.unet.conv_out.bias[4:] -= 5.0
    torch.testing.assert_close(*drawn["ddim"])
    torch.testing.assert_close(*drawn["small"])
    assert not torch.allclose(*drawn["learned"], atol=1e-2)


DDPM = DiffusionConfig()
EDM, FLOW = (DiffusionConfig(objective=name) for name in ("edm", "flow"))
SCHEDULERS = {
    "ddim": (DDPM, DDIMScheduler),
    "ddpm": (DDPM, DDPMScheduler),
    "euler": (DDPM, EulerDiscreteScheduler),
    "heun": (DDPM, HeunDiscreteScheduler),
    "dpm": (DDPM, DPMSolverMultistepScheduler),
    "edm": (EDM, EDMEulerScheduler),
    "edm_dpm": (EDM, EDMDPMSolverMultistepScheduler),
    "flow": (FLOW, FlowMatchEulerDiscreteScheduler),
}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def pipe_of(name: str) -> Any:
    diffusion, kind = SCHEDULERS[name]
    pipe = small_pipe(diffusion=diffusion)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture
def pipe() -> Any:
    pipe = small_pipe()
    pipe.register_to_config(class_names=["a", "b", "c"])
    return pipe


@pytest.fixture
def guide(pipe: Any) -> UNet2DConditionModel:
    """A worse network of the same shape."""
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.9)
    return unet


def picture(seed: int = 0, count: int = 1) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def outputs(pipe: Any, **words: Any) -> list[Tensor]:
    """The latents after each step."""
    found: list[Tensor] = []

    def note(_: Any, i: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert i == len(found)
        assert t in pipe.scheduler.timesteps
        found.append(tensors["latents"])
        return {}

    latents(pipe, callback_on_step_end=note, **words)
    return found


@each_scheduler
def test_every_scheduler_draws_from_seeds_alone(name: str) -> None:
    pipe = pipe_of(name)
    first, again = (latents(pipe, eta=1.0) for _ in range(2))
    assert torch.equal(first, again) and first.isfinite().all() and first.dtype == torch.float32
    alone = pipe([2], seeds=[4], num_inference_steps=4, output_type="latent", guidance_scale=3.0, eta=1.0).images
    torch.testing.assert_close(alone[0], first[1], rtol=1e-3, atol=1e-4)


@each_scheduler
def test_one_branch_is_evaluated_once_and_is_that_branch(name: str) -> None:
    pipe, sizes = pipe_of(name), []
    pipe.unet.register_forward_hook(lambda _module, _words, output: sizes.append(len(output.sample)))
    for w in (0.0, 1.0):
        latents(pipe, guidance_scale=w, guidance_rescale=0.7)
    assert set(sizes) == {2}
    usual, pipe.label_ids = pipe.label_ids, lambda _: [3, 3]
    null = latents(pipe, guidance_scale=1.0)
    pipe.label_ids = usual
    assert torch.equal(latents(pipe, guidance_scale=0.0), null)


def test_labels_are_ids_names_numbers_of_numpy_and_tensors(pipe: Any) -> None:
    assert pipe.label_ids([0, "c", np.int64(1), torch.tensor(2)]) == [0, 2, 1, 2]
    assert pipe.label_ids("b") == pipe.label_ids(np.int64(1)) == pipe.label_ids(1) == [1]
    assert pipe.label_ids(torch.tensor([2, 0])) == [2, 0]


def test_a_negative_label_takes_the_null_classs_place(pipe: Any) -> None:
    assert torch.equal(latents(pipe, guidance_scale=0.0, negative_label="b"), pipe_of_labels(pipe, ["b", 1]))
    assert torch.equal(latents(pipe, negative_label=1), latents(pipe, negative_label=["b", 1]))
    assert not torch.allclose(latents(pipe, negative_label=1), latents(pipe))
    step = {"num_inference_steps": 1}
    c, u = latents(pipe, guidance_scale=1.0, **step), latents(pipe, guidance_scale=0.0, negative_label=1, **step)
    torch.testing.assert_close(latents(pipe, negative_label=1, **step), u + 3 * (c - u), rtol=1e-3, atol=1e-3)


def pipe_of_labels(pipe: Any, labels: list[Any]) -> Tensor:
    return pipe(labels, seeds=SEEDS, guidance_scale=1.0, num_inference_steps=4, output_type="latent").images


def test_rescaling_is_eq_15_and_16() -> None:
    guided, c = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    for phi in (0.0, 0.7, 1.0):
        found = rescaled(3 * guided + 1, c, phi)
        for x, x_c, x_found in zip(3 * guided + 1, c, found, strict=True):
            back = x * (x_c.numpy().std(ddof=1) / x.numpy().std(ddof=1))
            torch.testing.assert_close(x_found, phi * back + (1 - phi) * x)
    torch.testing.assert_close(rescaled(guided, c, 1.0).std(dim=(1, 2, 3)), c.std(dim=(1, 2, 3)))


def test_rescaling_reaches_the_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda p, *args, **words: given.append(p) or step(p, *args, **words))
    words = {"num_inference_steps": 1}
    for w in (0.0, 1.0, 5.0):
        latents(pipe, guidance_scale=w, **words)
    latents(pipe, guidance_scale=5.0, guidance_rescale=0.7, **words)
    u, c, guided, found = given
    torch.testing.assert_close(guided, u + 5 * (c - u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, rescaled(guided, c, 0.7))
    assert torch.equal(latents(pipe, guidance_rescale=0.0), latents(pipe))


def test_outside_the_interval_the_network_is_conditional_alone(pipe: Any) -> None:
    plain, guided = outputs(pipe, guidance_scale=1.0), outputs(pipe)
    late, early = outputs(pipe, guidance_interval=(0.5, 1.0)), outputs(pipe, guidance_interval=(0.0, 0.5))
    for i in (0, 1):
        assert torch.equal(late[i], plain[i]) and torch.equal(early[i], guided[i])
    assert not torch.allclose(late[2], plain[2])
    assert torch.equal(latents(pipe, guidance_interval=(0.3, 0.3)), plain[-1])
    assert torch.equal(latents(pipe, guidance_interval=(0.0, 1.0)), guided[-1])
    sizes: list[int] = []
    pipe.unet.register_forward_hook(lambda _module, _words, output: sizes.append(len(output.sample)))
    latents(pipe, guidance_interval=(0.07, 0.28), num_inference_steps=100)
    assert [i for i, size in enumerate(sizes) if size == 4] == list(range(7, 28))
    sizes.clear()  # shares count from pure noise also where an image is begun with
    latents(pipe, guidance_interval=(0.5, 0.75), image=picture(), strength=0.75)
    assert sizes == [2, 4, 2]


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_a_network_that_guides_itself_is_conditional_alone(pipe: Any, w: float) -> None:
    plain = latents(pipe, guidance_scale=1.0)
    for same in (pipe.unet, copy.deepcopy(pipe.unet)):
        torch.testing.assert_close(latents(pipe, guidance_scale=w, guide=same), plain, rtol=0, atol=1e-6)


def test_autoguidance_leads_away_from_the_guides_conditional_prediction(pipe: Any, guide: UNet2DConditionModel) -> None:
    step = {"num_inference_steps": 1}
    c, guided = latents(pipe, guidance_scale=1.0, **step), latents(pipe, guide=guide, **step)
    unet, pipe.unet = pipe.unet, guide
    g = latents(pipe, guidance_scale=1.0, **step)
    pipe.unet = unet
    assert torch.equal(latents(pipe, guidance_scale=0.0, guide=guide, **step), g)
    torch.testing.assert_close(guided, g + 3 * (c - g), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(guided, c) and guide.device.type == "cpu"
    assert latents(pipe, guide=guide.to(torch.bfloat16)).dtype == torch.float32


def test_a_guide_is_moved_to_the_device_and_back(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda _, device: moves.append(device.type))
    with pytest.raises(KeyboardInterrupt), lent(pipe.unet, torch.device("meta")):
        raise KeyboardInterrupt
    with lent(pipe.unet, torch.device("cpu")), lent(None, torch.device("meta")):
        pass
    assert moves == ["meta", "cpu"]


@each_scheduler
def test_strength_one_is_as_if_no_image_came(name: str) -> None:
    pipe = pipe_of(name)
    assert torch.equal(latents(pipe, image=picture(), strength=1.0), latents(pipe))


@each_scheduler
def test_strength_nought_is_the_vaes_reconstruction(name: str) -> None:
    pipe, x = pipe_of(name), picture(count=2)
    wanted = pipe.vae.decode(pipe.vae.encode(2 * x - 1).latent_dist.mean).sample
    drawn = pipe(LABELS, image=x, strength=0.0, seeds=0, output_type="pt").images
    torch.testing.assert_close(drawn, (wanted / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@each_scheduler
def test_an_image_is_noised_as_the_scheduler_says_and_drawn_from_there(name: str) -> None:
    pipe, x = pipe_of(name), picture(count=2)
    z_0 = 0.5 * pipe.vae.encode(2 * x - 1).latent_dist.mean
    inputs: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _module, words: inputs.append(words[0]))
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = {"seeds": None, "num_inference_steps": 8, "guidance_scale": 1.0}
    steps = outputs(pipe, image=x, strength=0.5, latents=start, **words)
    order = getattr(pipe.scheduler, "order", 1)
    assert len(steps) == 4 * order - (order == 2)
    scheduler = pipe.scheduler
    t = scheduler.timesteps[4 * order]
    if name in {"ddim", "ddpm"}:
        bar = scheduler.alphas_cumprod[t]
        wanted = bar.sqrt() * z_0 + (1 - bar).sqrt() * start
    elif name == "flow":
        tau = t / 1000
        wanted = (1 - tau) * z_0 + tau * start
    elif name.startswith("edm"):
        sigma = (4 * t).exp()
        wanted = (z_0 + sigma * start) / (sigma**2 + 1).sqrt()
    else:  # z_0 + sigma eps, shown to the network at unit variance
        sigma = scheduler.sigmas[4 * order]
        wanted = (z_0 + sigma * start) / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(inputs[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_start_at_a_timestep_that_comes_twice_is_found(pipe: Any) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_exponential_sigmas=True)
    pipe.scheduler.set_timesteps(50)
    timesteps = pipe.scheduler.timesteps.tolist()
    first = next(i for i in range(50) if timesteps[i] == timesteps[i + 1])
    latents(pipe, image=picture(), strength=(50 - first) / 50, num_inference_steps=50, guidance_scale=1.0)
    assert pipe.scheduler.step_index == 50


def test_images_come_in_every_form(pipe: Any) -> None:
    whole = (picture() * 255).round().to(torch.uint8)
    array = whole[0].permute(1, 2, 0).numpy()
    forms = [whole, whole[0], whole / 255, [whole[0], whole], array, array[None] / np.float32(255)]
    forms += [Image.fromarray(array), [Image.fromarray(array), array]]
    words = {"strength": 0.5, "guidance_scale": 1.0}
    wanted = latents(pipe, image=whole, **words)
    for form in forms:
        torch.testing.assert_close(latents(pipe, image=form, **words), wanted, rtol=1e-4, atol=1e-4)
    default = latents(pipe, image=whole, num_inference_steps=10)
    assert torch.equal(default, latents(pipe, image=whole, num_inference_steps=10, strength=0.8))
    drawn = pipe([1], seeds=0, num_inference_steps=2).images
    assert pipe([2], image=drawn, seeds=0, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("strength", "taken"), [(0.29, 29), (0.07, 7), (0.999, 99), (0.005, 0), (0.01, 1)])
def test_strength_is_a_share_of_the_steps_in_whole_ones(pipe: Any, strength: float, taken: int) -> None:
    words = {"num_inference_steps": 100, "guidance_scale": 1.0}
    assert len(outputs(pipe, image=picture(), strength=strength, **words)) == taken


@pytest.mark.parametrize(
    ("objective", "made", "said"),
    [
        (DDPM, FlowMatchEulerDiscreteScheduler, "takes the U-Net's output for 'flow_prediction'.* 'epsilon'"),
        (DDPM, EDMEulerScheduler, "'edm epsilon, sigma_data 0.5'.* 'epsilon'"),
        (DDPM, partial(DDPMScheduler.from_config, prediction_type="v_prediction"), "'v_prediction'.* 'epsilon'"),
        (DDPM, ScoreSdeVeScheduler, "'unknown'.* 'epsilon'"),
        (EDM, DDIMScheduler, "'epsilon'.* 'edm epsilon, sigma_data 1'"),
        (EDM, partial(EDMEulerScheduler.from_config, sigma_data=0.5), "sigma_data 0.5'.* sigma_data 1'"),
        (FLOW, DDIMScheduler, "'epsilon'.* 'flow_prediction'"),
        (FLOW, DPMSolverMultistepScheduler, "'epsilon'.* 'flow_prediction'"),
    ],
)
def test_a_scheduler_for_another_kind_of_network_is_refused(objective: Any, made: Any, said: str) -> None:
    pipe = small_pipe(diffusion=objective)
    made = made if isinstance(made, partial) else made.from_config
    pipe.scheduler = made(pipe.scheduler.config)
    with pytest.raises(ValueError, match=said):
        latents(pipe)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_other_families_solvers_serve_a_flow_by_their_names(name: str) -> None:
    pipe = small_pipe(diffusion=FLOW)
    euler = latents(pipe, num_inference_steps=100)
    pipe.scheduler = scheduler_like(pipe, name)
    assert type(pipe.scheduler).__name__ == name
    torch.testing.assert_close(latents(pipe, num_inference_steps=100), euler, atol=0.02, rtol=0.02)


def test_a_learned_variance_goes_to_whom_it_serves(learned: Any, pipe: Any) -> None:
    config = DDPMScheduler.from_config(learned.scheduler.config, variance_type="learned_range").config
    learned.scheduler = DDIMScheduler.from_config(config)  # carries the name and has no use for it
    assert latents(learned).isfinite().all()
    learned.scheduler = DPMSolverMultistepScheduler.from_config(config)
    with pytest.raises(ValueError, match="variance_type=None was wanted"):
        latents(learned)
    learned.scheduler = DPMSolverMultistepScheduler.from_config(config, variance_type=None)
    assert latents(learned).isfinite().all()
    pipe.scheduler = DDPMScheduler.from_config(config)
    with pytest.raises(ValueError, match="this U-Net says none"):
        latents(pipe)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale: -1.0 came"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan came"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: 1.5 came, 0 to 1"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval: \(0.8, 0.2\) came"),
        ({"guidance_interval": (0.0, 2.0)}, "guidance_interval"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 came"),
        ({"output_type": "jpg"}, "output_type: 'jpg' came"),
        ({"negative_label": "z"}, "class name 'z' came; known: a, b, c"),
        ({"negative_label": [0, 1, 2]}, "negative_label, negative_prompt: 3 labels and 0 prompts came for 2 images"),
        ({"seeds": [1, 2, 3]}, "3 seeds or generators came for 2 labels"),
        ({"generator": torch.Generator()}, "seeds and generator came"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents \[1, 4, 8, 8\] came"),
        ({"strength": 0.5}, "strength came without an image"),
        ({"image": picture(), "strength": 1.1}, "strength: 1.1 came, 0 to 1"),
        ({"image": picture(), "strength": -0.1}, "strength: -0.1 came, 0 to 1"),
        ({"image": picture(count=3)}, "3 images came for 2 labels"),
        ({"image": torch.zeros(3, 16, 20)}, r"\[1, 3, 16, 20\] came, \['B', 3, 16, 16\] was wanted"),
        ({"image": Image.new("RGB", (32, 32))}, r"\[1, 3, 32, 32\] came"),
        ({"image": np.zeros((16, 16))}, r"\[16, 16\] came"),
        ({"image": 2 * picture() - 1}, "values from -0.99.* came, 0 to 1"),
        ({"image": "cat.png"}, "str came, PIL"),
        ({"image": []}, "an empty list of images came"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_drawn(pipe: Any, words: dict[str, Any], said: str) -> None:
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=said):
        latents(pipe, **words)
    with pytest.raises(ValueError, match="no class_labels came, which this model wants"):
        pipe()
    for label in (1.5, [0.0]):
        with pytest.raises(ValueError, match="an id or a name was wanted"):
            pipe(label)


def test_a_guide_of_another_shape_is_refused(pipe: Any) -> None:
    other = small_pipe(channels_out=8).unet
    other.register_to_config(num_class_embeds=11)
    with pytest.raises(ValueError, match="out_channels 8 came, 4 was wanted; num_class_embeds 11 came, 4 was wanted"):
        latents(pipe, guide=other)
    with pytest.raises(ValueError, match="guide and negative_label came"):
        latents(pipe, guide=pipe.unet, negative_label=1)


def test_an_image_needs_a_scheduler_that_adds_noise_and_begins_midway(pipe: Any) -> None:
    class Noiseless(DDIMScheduler):
        add_noise = property()  # pyright: ignore[reportAssignmentType]

    pipe.scheduler = Noiseless.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="Noiseless can't add noise"):
        latents(pipe, image=picture())
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="PNDMScheduler can't begin midway"):
        latents(pipe, image=picture())
    assert torch.equal(latents(pipe, image=picture(), strength=1.0), latents(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_leave_latents_and_steps_in_fp32(pipe: Any, dtype: torch.dtype) -> None:
    wanted = latents(pipe)
    pipe.to(dtype)
    seen: set[torch.dtype] = set()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda p, t, z, **words: seen.update({p.dtype, z.dtype}) or step(p, t, z, **words)
    near = latents(pipe)
    assert seen == {torch.float32} == {near.dtype}
    assert float((near - wanted).norm() / wanted.norm()) < 0.05
    drawn = pipe([1], seeds=0, num_inference_steps=2, image=picture(), output_type="pt").images
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_a_callback_may_give_back_other_latents(pipe: Any) -> None:
    last = latents(pipe, callback_on_step_end=lambda _p, _i, _t, tensors: {"latents": tensors["latents"] * 0})
    assert not last.any()
    seen: list[tuple[int, float]] = []
    latents(small_pipe(diffusion=EDM), callback_on_step_end=lambda _p, i, t, _z: seen.append((i, t)) or {})
    assert [i for i, _ in seen] == [0, 1, 2, 3] and seen[0][1] == pytest.approx(math.log(80) / 4)


def test_the_vaes_switches_serve(pipe: Any) -> None:
    words = {"seeds": SEEDS, "num_inference_steps": 2, "output_type": "pt"}
    wanted = pipe(LABELS, **words).images
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe(LABELS, **words).images, wanted)
    pipe.vae.enable_tiling()
    assert pipe(LABELS, **words).images.shape == wanted.shape


@pytest.mark.parametrize("diffusion", [DDPM, EDM, FLOW], ids=["ddpm", "edm", "flow"])
def test_what_is_saved_opens_anywhere_and_stays_itself(tmp_path: Path, diffusion: DiffusionConfig) -> None:
    pipe = small_pipe(diffusion=diffusion)
    pipe.register_to_config(class_names=["a", "b", "c"])
    wanted = latents(pipe)
    pipe.save_pretrained(tmp_path / "one")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "one", trust_remote_code=True)
    opened.save_pretrained(tmp_path / "two")  # as push_to_hub does
    again: Any = ClassConditionalPipeline.from_pretrained(tmp_path / "two", trust_remote_code=True)
    for other in (opened, again):
        assert other.config["class_names"] == ["a", "b", "c"] and other.label_ids(["c"]) == [2]
        assert other.config["prediction"] == pipe.config["prediction"]
        assert torch.equal(latents(other), wanted)
        assert callable(other.push_to_hub)
    assert (tmp_path / "two" / "pipeline.py").read_bytes() == Path(class_conditional.__file__).read_bytes()


def test_the_saved_prediction_holds_for_a_scheduler_given_in_its_place(tmp_path: Path) -> None:
    pipe = small_pipe(diffusion=EDM)
    pipe.save_pretrained(tmp_path)
    opened: Any = ClassConditionalPipeline.from_pretrained(
        tmp_path, trust_remote_code=True, scheduler=DDIMScheduler(), torch_dtype={"unet": torch.bfloat16}
    )
    assert (opened.unet.dtype, opened.vae.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="'epsilon'; it was trained to say 'edm epsilon, sigma_data 1'"):
        latents(opened)
    said = json.loads((tmp_path / "model_index.json").read_text())
    del said["prediction"]  # as in an older export: the scheduler saved with it tells
    (tmp_path / "model_index.json").write_text(json.dumps(said))
    older: Any = ClassConditionalPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert older.config["prediction"] == pipe.config["prediction"]
