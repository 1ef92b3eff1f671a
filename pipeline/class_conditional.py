"""A diffusers pipeline that draws images of the classes asked for, of the prompts, or of both, from a latent U-Net.

This file is saved with the pipeline as `pipeline.py` and opens there with
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`; so it imports nothing of the project it comes from.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

Label = int | str
UNet = UNet2DConditionModel
Generators = torch.Generator | list[torch.Generator] | None

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRENGTH = 0.8  # of the way back to noise, where an image came and no strength
GUIDE_SHARES = (
    *("in_channels", "out_channels", "sample_size"),
    *("num_class_embeds", "encoder_hid_dim", "cross_attention_dim", "addition_embed_type"),
)


class Told(NamedTuple):
    """What the U-Net is told of B images beside z_t and t; None: what this model is not told."""

    labels: Tensor | None = None  # int64 [B]; the last class is the null class
    tokens: Tensor | None = None  # [B,L,D] of the text encoders
    pooled: Tensor | None = None  # [B,P] of the second of two, as Stable Diffusion XL has it
    time_ids: Tensor | None = None  # [B,6] beside it, pixels: see `time_ids`

    def beside(self, other: Told) -> Told:
        """Both after one another, [2B,...]."""
        return Told(*(None if a is None or b is None else torch.cat([a, b]) for a, b in zip(self, other, strict=True)))

    def arguments(self, unet_config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """As keyword arguments of UNet2DConditionModel.

        The class enters through the class embedding, added to the timestep's; or, in a U-Net without one, as a single
        condition token, a row of its linear layer `encoder_hid_proj` (Rombach et al. 2022, the class-conditional
        models).  UNet2DConditionModel wants condition tokens in any case: without text, one of zeros, [B,1,D].
        """
        given: dict[str, Any] = {}
        labels, tokens = self.labels, self.tokens
        if labels is not None and unet_config["num_class_embeds"]:
            given["class_labels"] = labels
        elif labels is not None:
            rows = unet_config["encoder_hid_dim"]
            tokens = torch.nn.functional.one_hot(labels, rows)[:, None]
        if tokens is None:
            assert labels is not None
            tokens = torch.zeros(len(labels), 1, unet_config["cross_attention_dim"], device=labels.device)
        given["encoder_hidden_states"] = tokens.to(dtype)
        if self.pooled is not None and self.time_ids is not None:
            given["added_cond_kwargs"] = {"text_embeds": self.pooled.to(dtype), "time_ids": self.time_ids.to(dtype)}
        return given


class Asked(NamedTuple):
    """Arguments of the networks beside z_t and t, the same in every step."""

    c: dict[str, Any]  # for the condition
    u: dict[str, Any]  # for what takes the null condition's place, or the guide's for the condition
    both: dict[str, Any]  # of the U-Net for [u, c] together


def null_class(unet: UNet) -> int | None:
    """The label that means "no class": the last row of the class embedding.  None in a U-Net without classes."""
    rows = unet.config["num_class_embeds"] or unet.config["encoder_hid_dim"]
    return int(rows) - 1 if rows else None


def tokenize(tokenizers: Sequence[Any], texts: Sequence[str]) -> Tensor:
    """Token ids of B texts for each of K tokenizers, int64 [B,K,L]: padded to L, what is longer cut off."""
    words: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    each = [of(list(texts), max_length=of.model_max_length, **words).input_ids for of in tokenizers]
    return torch.stack(each, dim=1)


def read_text(encoders: Sequence[Any], input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What CLIP text models make of token ids int64 [B,K,L], K of them → tokens [B,L,D] and pooled [B,P].

    Of one encoder the last hidden state, as StableDiffusionPipeline has it, and nothing pooled.  Of two the last hidden
    states but one, side by side, and the projection of the second, as StableDiffusionXLPipeline has them.
    """
    if len(encoders) == 1:
        return encoders[0](input_ids[:, 0])[0], None
    said = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(1), strict=True)]
    return torch.cat([output.hidden_states[-2] for output in said], dim=-1), said[1].text_embeds


def time_ids(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> list[int]:
    """What an SDXL network is told of sizes (Podell et al. 2023 section 2.2), pixels: six numbers.

    Height and width of the image as it was found; top and left of the square in the image scaled; its height and width.
    """
    return [*original, *corner, *target]


def own_config(scheduler: Any) -> dict[str, Any]:
    """The settings that this kind of scheduler has; its config may carry those of the one it was made from besides."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in known}


def prediction_of(scheduler: Any) -> str:
    """What a scheduler takes the U-Net's output for; it serves the U-Nets that were trained to say that.

    epsilon, v_prediction or sample; flow_prediction; for EDM also its σ_data, which the preconditioning needs
    (Karras et al. 2022 table 1).
    """
    config = own_config(scheduler)
    said = config.get("prediction_type")
    if "sigma_data" in config:
        return f"edm {said}, sigma_data {config['sigma_data']:g}"
    if hasattr(scheduler, "scale_noise"):  # what flow matching's own schedulers have; they have no prediction_type
        return "flow_prediction"
    if config.get("use_flow_sigmas", False) != (said == "flow_prediction"):
        return f"{said} with use_flow_sigmas {config.get('use_flow_sigmas')}"
    return said or "unknown"


def _learned(scheduler: Any) -> bool:
    return str(own_config(scheduler).get("variance_type")).startswith("learned")


def rescaled(guided: Tensor, c: Tensor, rescale: float) -> Tensor:
    """Guidance without its gain in contrast: Lin et al. 2024 ("Common diffusion noise schedules…") eq. 15-16.

    φ · guided · std(c)/std(guided) + (1-φ) · guided, the deviations over each image's C, h and w.  [B,C,h,w].
    """
    if rescale == 0:
        return guided
    back = c.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (rescale * back + (1 - rescale))


def pixels(image: Any, shape: tuple[int, int, int]) -> Tensor:
    """PIL, NumPy [H,W,C] or [B,H,W,C], tensor [C,H,W] or [B,C,H,W], or a list of them → float32 [B,C,H,W] in 0..1.

    Whole numbers count 0..255.  ValueError: nothing, something else, another `shape` (C, H, W), other values.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("an empty list of images came")
        return torch.cat([pixels(one, shape) for one in image])
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image)).movedim(-1, -3) if image.ndim in {3, 4} else torch.tensor(image)
    if not isinstance(image, Tensor):
        raise ValueError(f"image: {type(image).__name__} came, PIL, NumPy, a tensor or a list of them was wanted")
    x = image[None] if image.ndim == 3 else image
    if x.shape[1:] != shape or len(x) == 0:
        raise ValueError(f"image: [B,C,H,W] {list(x.shape)} came, {['B', *shape]} was wanted; resize it first")
    x = x.float() if x.is_floating_point() else x.float() / 255
    if not (x.min() >= 0 and x.max() <= 1):  # NaN too
        raise ValueError(f"image: values from {float(x.min()):g} to {float(x.max()):g} came, 0 to 1 was wanted")
    return x


@contextmanager
def lent(guide: UNet | None, device: torch.device) -> Generator[None]:
    """The guide network on this device for as long as it is asked, then where it was."""
    if guide is None or guide.device == device:
        yield
        return
    home = guide.device
    torch.nn.Module.to(guide, device)
    try:
        yield
    finally:
        torch.nn.Module.to(guide, home)


class ClassConditionalPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion (Rombach et al. 2022) with classifier-free guidance (Ho & Salimans 2022).

    With text encoders it draws from prompts too, and from both together where the U-Net knows both.  Weights may be in
    half precision; latents, guidance and the scheduler's steps are fp32 always.  Large images:
    `pipe.vae.enable_tiling()`, `pipe.vae.enable_slicing()`; little memory: `pipe.enable_model_cpu_offload()`.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet,
        scheduler: SchedulerMixin,
        class_names: list[str] | None = None,
        prediction: str | None = None,
        *,
        tokenizer: Any = None,
        text_encoder: Any = None,
        tokenizer_2: Any = None,
        text_encoder_2: Any = None,
    ) -> None:
        """`unet`: trained on (z - shift) * scale of this VAE, its last class the null class.

        `tokenizer`, `text_encoder`: CLIP's, where it was trained on captions; `_2`: the second ones, as in SDXL.

        `prediction`: what it was trained to say, in the words of `prediction_of`; by default what this scheduler takes
        it for.  It is saved with the pipeline, and a call with a scheduler of another sort is refused.
        """
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
        )
        self.register_to_config(
            class_names=list(class_names) if class_names else None, prediction=prediction or prediction_of(scheduler)
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config["block_out_channels"]) - 1))

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """This file and model_index.json: with them what is saved or pushed opens wherever diffusers is."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_bytes(Path(__file__).read_bytes())
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json, which names the class in the pipeline.py beside it."""
        said = json.loads(super().to_json_string())
        return json.dumps(said | {"_class_name": ["pipeline", ClassConditionalPipeline.__name__]}, indent=2) + "\n"

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; the null class is not among them.  0: this model knows none."""
        return null_class(self.unet) or 0

    @property
    def _pixels(self) -> int:
        """The side of the images."""
        return self.unet.config["sample_size"] * self.image_processor.config["vae_scale_factor"]

    @property
    def text_encoders(self) -> list[Any]:
        """CLIP's text models: none, one or two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    def label_ids(self, class_labels: Label | Iterable[Label]) -> list[int]:
        """Labels given as ids or names, one or many, mixed → ids.  Raises ValueError naming what is known."""
        names: list[str] | None = self.config["class_names"]
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        ids: list[int] = []
        for label in class_labels:
            if isinstance(label, str):
                if names is None or label not in names:
                    raise ValueError(f"class name {label!r} came; known: {', '.join(names) if names else 'no names'}")
                ids.append(names.index(label))
            elif not hasattr(label, "__index__"):
                raise ValueError(f"class label {label!r} came, an id or a name was wanted")
            elif 0 <= index(label) < self.num_classes:
                ids.append(index(label))
            else:
                raise ValueError(f"class id {index(label)} came, 0 to {self.num_classes - 1} was wanted")
        if not ids:
            raise ValueError("no class label came")
        return ids

    @torch.no_grad()
    def tell(
        self,
        class_labels: Label | Iterable[Label] | None = None,
        prompt: str | Sequence[str] | None = None,
        count: int | None = None,
        *,
        device: torch.device | None = None,
    ) -> Told:
        """Classes, prompts or both, as the U-Net is told them; one of a kind serves for all `count` images.

        `device`: where the networks compute, for who knows it: diffusers walks through all their modules to say it.
        What the model knows and isn't given is its null condition: the null class, the text "".  Raises ValueError.
        """
        ids = None if class_labels is None else self.label_ids(class_labels)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for name, given, known in (
            ("class_labels", ids, self.num_classes),
            ("prompt", prompts, len(self.text_encoders)),
        ):
            if given is not None and not known:
                raise ValueError(f"{name} came, which this model was not trained with")
        counts = {len(given) for given in (ids, prompts) if given is not None} | ({count} if count else set())
        if len(counts - {1}) > 1 or 0 in counts:
            raise ValueError(
                f"{len(ids or ())} labels and {len(prompts or ())} prompts came"
                + (f" for {count} images" if count else "")
                + "; as many of each, or one for all, were wanted"
            )
        num_images, device = max(counts, default=1), device or self._execution_device
        told = Told()
        if self.num_classes:
            told = Told(torch.tensor(ids or [self.num_classes], device=device).expand(num_images))
        if self.text_encoders:
            tokens, pooled = read_text(self.text_encoders, self.input_ids(prompts or [""]).to(device))
            told = told._replace(tokens=tokens.expand(num_images, -1, -1))
            if pooled is not None:
                size = (self._pixels, self._pixels)
                ids_of_size = torch.tensor([time_ids(size, (0, 0), size)], device=device, dtype=tokens.dtype)
                told = told._replace(pooled=pooled.expand(num_images, -1), time_ids=ids_of_size.expand(num_images, -1))
        return told

    def input_ids(self, prompts: Sequence[Any]) -> Tensor:
        """Token ids of B prompts for each text encoder, int64 [B,K,L]; what is too long is cut off."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt: {prompt!r} came, a text was wanted")
        return tokenize([words for words in (self.tokenizer, self.tokenizer_2) if words is not None], prompts)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Iterable[Label] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_label: Label | Iterable[Label] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guide: UNet | None = None,
        image: Any = None,
        strength: float | None = None,
        num_inference_steps: int = 50,
        seeds: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label, or for each prompt.

        What is drawn.  `class_labels`: ids or names, also mixed; `prompt`: texts; a model of both wants both, one of
        a kind serves for all.  `seeds`: an integer for each image (one integer s means s, s + 1, …): an image is a
        function of its seed, label and prompt, whatever else is in the batch.  `generator`:
        diffusers' own way, instead of `seeds`.  `latents`: noise from N(0, I), [B,C,h,w], instead of theirs.

        How it is guided.  `guidance_scale`: w in u + w (c - u); 1 is the conditional network alone, 0 the unconditional
        one, and both cost one evaluation.  `negative_label`, `negative_prompt`: one, or one for each image: u is their
        prediction instead of the null condition's.  `guide`: another, worse U-Net, whose prediction for the same
        condition is u (autoguidance, Karras et al. 2024).  It takes their place, and so goes with none of them.
        `guidance_rescale`: φ in 0..1, how much of the added contrast is taken back (Lin et al. 2024).
        `guidance_interval`: (start, end), shares of the steps counted from pure noise: step i of n is guided where
        start <= i/n < end, elsewhere w is 1 (Kynkäänniemi et al. 2024).  (0.2, 0.8) spares both ends.

        What it starts from.  `image`: PIL, NumPy [H,W,3] or tensor [3,H,W] in 0..1, a batch or a list of them, at the
        pipeline's own size; one for all labels, or one for each.  It is encoded to the posterior's mean.  `strength`:
        the share of the steps that are taken, in whole steps rounded down (0.8 by default): 1 is pure noise, as if no
        image came; 0 is the VAE's reconstruction.

        How.  `eta`: 0 is DDIM, 1 ancestral (DDIM eq. 16), where the scheduler has it.  `output_type`: pil,
        np ([B,H,W,3] in 0..1), pt ([B,3,H,W] in 0..1) or latent (z_0).  `callback_on_step_end`: called with the
        pipeline, the number of the step, its timestep and {"latents": z_t}; what it gives back may hold other latents.

        Raises ValueError, before anything is computed, for arguments out of range, unknown labels, a condition that the
        model doesn't know or lacks, lists of different length, an image of another size, and a guide or scheduler that
        doesn't fit the U-Net.
        """
        self._check_numbers(num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, output_type)
        self._check_scheduler()
        self._check_guide(guide, negative_label, negative_prompt)
        for name, given, known in (
            ("class_labels", class_labels, self.num_classes),
            ("prompt", prompt, len(self.text_encoders)),
        ):
            if given is None and known:
                raise ValueError(f"no {name} came, which this model wants")
        labels = None if class_labels is None else self.label_ids(class_labels)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = max(len(labels or ()), len(prompts or ()))
        x = self._image(image, strength, count)
        generators = self._generators(seeds, generator, count)
        device = self._execution_device
        noise = self._noise(latents, generators, count).to(device, torch.float32)  # [B,C,h,w]
        c = self.tell(labels, prompts, count, device=device)
        try:
            u = c if guide is not None else self.tell(negative_label, negative_prompt, count, device=device)
        except ValueError as error:
            raise ValueError(f"negative_label, negative_prompt: {error}") from None

        # Once: to know a network's dtype diffusers walks through all its weights.
        dtype, other = self.unet.dtype, self.unet if guide is None else guide
        asked = Asked(
            c.arguments(self.unet.config, dtype),
            u.arguments(other.config, dtype if guide is None else guide.dtype),
            u.beside(c).arguments(self.unet.config, dtype),
        )
        takes_variance = self._takes_variance

        z_t, first = self._start(noise, x, STRENGTH if strength is None else strength, num_inference_steps)
        extra = self._step_arguments(generators, eta)
        timesteps = self.scheduler.timesteps
        start, end = guidance_interval
        with lent(guide, device), self.progress_bar(total=len(timesteps) - first) as bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps[first:], first):
                w = guidance_scale if start <= i / len(timesteps) < end else 1.0
                z_in = self.scheduler.scale_model_input(z_t, t) if hasattr(self.scheduler, "scale_model_input") else z_t
                prediction, variance = self._guided(z_in, t, asked, w=w, rescale=guidance_rescale, guide=guide)
                if takes_variance:
                    prediction = torch.cat([prediction, variance], dim=1)
                z_t = self.scheduler.step(prediction, t, z_t, **extra).prev_sample
                if callback_on_step_end is not None:
                    z_t = callback_on_step_end(self, i - first, t.item(), {"latents": z_t}).get("latents", z_t)
                bar.update()

        images: Any = z_t if output_type == "latent" else self._decode(z_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided(
        self, z: Tensor, t: Tensor, asked: Asked, *, w: float, rescale: float, guide: UNet | None
    ) -> tuple[Tensor, Tensor]:
        """u + w (c - u), Ho & Salimans 2022 eq. 6 with w = 1 + their w.  One half alone where the other has no part.

        u is the U-Net's for other conditions, or the guide's.  A learned variance is not guided: it is c's (at w = 0,
        u's), and of use to few schedulers.
        """
        if w == 1:
            return self._predict(self.unet, z, t, asked.c)
        if w == 0:
            return self._predict(self.unet if guide is None else guide, z, t, asked.u)
        if guide is None:
            both, variances = self._predict(self.unet, torch.cat([z, z]), t, asked.both)
            u, c = both.chunk(2)
            variance = variances.chunk(2)[1]
        else:  # Karras et al. 2024 ("Guiding a diffusion model with a bad version of itself") eq. 4
            u, _ = self._predict(guide, z, t, asked.u)
            c, variance = self._predict(self.unet, z, t, asked.c)
        return rescaled(u + w * (c - u), c, rescale), variance

    def _predict(self, unet: UNet, z: Tensor, t: Tensor, told: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The prediction [B,C,h,w], and the learned variance's channels: as many, or none.  fp32, as z is."""
        output = unet(z.to(told["encoder_hidden_states"].dtype), t, **told).sample.to(z.dtype)
        channels = z.shape[1]
        return output[:, :channels], output[:, channels:]

    def _start(self, noise: Tensor, x: Tensor | None, strength: float, steps: int) -> tuple[Tensor, int]:
        """The latents that sampling starts from, and the index of its first timestep."""
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=noise.device)
        kept = steps if x is None else sum(k / steps <= strength for k in range(1, steps + 1))
        # Some schedulers evaluate the network `order` times a step, and have a timestep for each.
        first = (steps - kept) * getattr(scheduler, "order", 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        if x is None or kept == steps:
            return noise * getattr(scheduler, "init_noise_sigma", 1.0), 0  # flow matching's schedulers have none
        if len(scheduler.timesteps) > steps * getattr(
            scheduler, "order", 1
        ):  # PNDM's warm-up is part of its first steps
            raise ValueError(f"image: {type(scheduler).__name__} can't begin midway; another scheduler was wanted")
        z_0 = self._encode(x).expand_as(noise)
        if kept == 0:
            return z_0, len(scheduler.timesteps)
        t = scheduler.timesteps[first : first + 1]
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(z_0, t, noise), first
        return scheduler.add_noise(z_0, noise, t), first

    def _encode(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in 0..1 → z_0 [B,C,h,w], fp32: the posterior's mean."""
        mean = self.vae.encode((2 * x - 1).to(self._execution_device, self.vae.dtype)).latent_dist.mean.float()
        return (mean - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config["scaling_factor"]

    def _decode(self, z_0: Tensor, output_type: str) -> Any:
        shift = self.vae.config.get("shift_factor") or 0.0
        z = z_0 / self.vae.config["scaling_factor"] + shift
        x = self.vae.decode(z.to(self.vae.dtype)).sample.float()  # [B,3,H,W] in [-1,1]
        return self.image_processor.postprocess(x, output_type=output_type)

    def _check_numbers(
        self, steps: int, w: float, rescale: float, interval: tuple[float, float], output_type: str
    ) -> None:
        for name, value, fits, wanted in (
            ("num_inference_steps", steps, steps >= 1, "1 or more"),
            ("guidance_scale", w, math.isfinite(w) and w >= 0, "a finite number of 0 or more"),
            ("guidance_rescale", rescale, 0 <= rescale <= 1, "0 to 1"),
            ("guidance_interval", interval, 0 <= interval[0] <= interval[1] <= 1, "0 <= start <= end <= 1"),
            ("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
        ):
            if not fits:
                raise ValueError(f"{name}: {value!r} came, {wanted} was wanted")

    @property
    def _takes_variance(self) -> bool:
        """Whether the scheduler's steps use a learned variance: ancestral ones of variance_type learned*."""
        known = inspect.signature(getattr(self.scheduler, "_get_variance", self.scheduler.step)).parameters
        return "predicted_variance" in known and _learned(self.scheduler)

    def _check_scheduler(self) -> None:
        kind, wanted = type(self.scheduler).__name__, self.config["prediction"]
        if (said := prediction_of(self.scheduler)) != wanted:
            raise ValueError(
                f"scheduler: {kind} came, which takes the U-Net's output for {said!r}; it was trained to say {wanted!r}"
            )
        if not self._takes_variance and _learned(self.scheduler):  # such solvers keep three channels: no latents
            raise ValueError(f"scheduler: {kind} with a learned variance came, variance_type=None was wanted")
        if self._takes_variance and self.unet.config["out_channels"] != 2 * self.unet.config["in_channels"]:
            raise ValueError(f"scheduler: {kind} with a learned variance came, and this U-Net says none")

    def _check_guide(self, guide: UNet | None, negative_label: Any, negative_prompt: Any) -> None:
        if guide is None:
            return
        for name, given in (("negative_label", negative_label), ("negative_prompt", negative_prompt)):
            if given is not None:
                raise ValueError(
                    f"guide and {name} came; one of them was wanted: each takes the null condition's place"
                )
        differ = [name for name in GUIDE_SHARES if guide.config[name] != self.unet.config[name]]
        if differ:
            said = (f"{name} {guide.config[name]} came, {self.unet.config[name]} was wanted" for name in differ)
            raise ValueError(f"guide: {'; '.join(said)}")

    def _image(self, image: Any, strength: float | None, count: int) -> Tensor | None:
        """The image argument as [B or 1,C,H,W] in 0..1, checked."""
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"strength: {strength} came, 0 to 1 was wanted")
        if image is None:
            if strength is not None:
                raise ValueError("strength came without an image")
            return None
        x = pixels(image, (self.vae.config["in_channels"], self._pixels, self._pixels))
        if len(x) not in {1, count}:
            raise ValueError(f"{len(x)} images came for {count} labels or prompts; as many or one was wanted")
        if not (hasattr(self.scheduler, "add_noise") or hasattr(self.scheduler, "scale_noise")):
            raise ValueError(f"image: {type(self.scheduler).__name__} can't add noise to one; another was wanted")
        return x

    def _generators(self, seeds: int | Sequence[int] | None, generator: Generators, count: int) -> Generators:
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator came; one of them was wanted")
        if isinstance(seeds, int | np.integer):
            seeds = range(int(seeds), int(seeds) + count)
        if seeds is not None:
            generator = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} seeds or generators came for {count} labels or prompts")
        return generator

    def _noise(self, latents: Tensor | None, generator: Generators, count: int) -> Tensor:
        size = self.unet.config["sample_size"]
        shape = (self.unet.config["in_channels"], size, size)
        if latents is not None:
            if latents.shape != (count, *shape):
                raise ValueError(f"latents {list(latents.shape)} came, {[count, *shape]} was wanted")
            return latents
        if isinstance(generator, list):
            return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generator])
        device = generator.device if generator is not None else torch.device("cpu")
        return torch.randn((count, *shape), generator=generator, device=device)

    def _step_arguments(self, generator: Generators, eta: float) -> dict[str, Any]:
        """What this scheduler's `step` takes besides the usual."""
        known = inspect.signature(self.scheduler.step).parameters
        given = {"eta": eta, "generator": generator}
        return {name: value for name, value in given.items() if name in known}
