"""A diffusers pipeline that draws images of the classes asked for, from a latent U-Net with class embeddings.

This file is copied into every export as `pipeline.py` and opens there with
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`; so it imports diffusers and torch alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

Label = int | str


def null_class(unet: UNet2DConditionModel) -> int:
    """The label that means "no class": the last row of the class embedding."""
    return int(unet.config["num_class_embeds"]) - 1


def class_arguments(labels: Tensor, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Class labels int64 [B] → the U-Net's condition.

    The class enters through the class embedding, added to the timestep's.  UNet2DConditionModel wants condition
    tokens all the same: one of zeros, [B,1,D].
    """
    return {
        "class_labels": labels,
        "encoder_hidden_states": torch.zeros(len(labels), 1, width, device=labels.device, dtype=dtype),
    }


class ClassConditionalPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion (Rombach et al. 2022) with classifier-free guidance (Ho & Salimans 2022)."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        class_names: list[str] | None = None,
    ) -> None:
        """`unet`: trained on (z - shift) * scale of this VAE, its last class embedding the null class."""
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names) if class_names else None)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config["block_out_channels"]) - 1))

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; the null class is not among them."""
        return null_class(self.unet)

    def label_ids(self, class_labels: Label | Sequence[Label]) -> list[int]:
        """Labels given as ids or names, one or many → ids.  Raises ValueError naming what is known."""
        names: list[str] | None = self.config["class_names"]
        asked = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        ids: list[int] = []
        for label in asked:
            if isinstance(label, str):
                if names is None or label not in names:
                    raise ValueError(f"class name {label!r} came; known: {', '.join(names) if names else 'no names'}")
                ids.append(names.index(label))
            elif 0 <= int(label) < self.num_classes:
                ids.append(int(label))
            else:
                raise ValueError(f"class id {label} came, 0 to {self.num_classes - 1} was wanted")
        if not ids:
            raise ValueError("no class label came")
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        *,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 50,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        `class_labels`: ids or names.  `guidance_scale`: w in u + w (c - u); 1 is the conditional network alone, 0
        the unconditional one.  `seeds`: an integer for each image (one integer s means s, s + 1, …): an image is a
        function of its seed and label, whatever else is in the batch.  `generator`: diffusers' own way, instead of
        `seeds`.  `latents`: [B,C,h,w], instead of both.  `eta`: 0 is DDIM, 1 ancestral (DDIM eq. 16), where the
        scheduler has it.  `output_type`: pil, np ([B,H,W,3] in 0..1), pt ([B,3,H,W] in 0..1) or latent (z_0).
        Raises ValueError for unknown labels and lists of different length.
        """
        ids = self.label_ids(class_labels)
        device, dtype = self._execution_device, self.unet.dtype
        generators = self._generators(seeds, generator, len(ids))
        z_t = self._initial_noise(latents, generators, len(ids)).to(device, dtype)  # [B,C,h,w]
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        z_t = z_t * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching's schedulers have none

        labels = torch.tensor(ids, device=device)
        nulls = torch.full_like(labels, self.num_classes)
        extra = self._step_arguments(generators, eta)
        with self.progress_bar(total=num_inference_steps) as bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(self.scheduler.timesteps):
                z_in = self.scheduler.scale_model_input(z_t, t) if hasattr(self.scheduler, "scale_model_input") else z_t
                prediction = self._guided(z_in, t, labels, nulls, guidance_scale)
                z_t = self.scheduler.step(prediction, t, z_t, **extra).prev_sample
                if callback_on_step_end is not None:
                    z_t = callback_on_step_end(self, i, int(t), {"latents": z_t}).get("latents", z_t)
                bar.update()

        images: Any = z_t if output_type == "latent" else self._decode(z_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided(self, z: Tensor, t: Tensor, labels: Tensor, nulls: Tensor, w: float) -> Tensor:
        """u + w (c - u), Ho & Salimans 2022 eq. 6 with w = 1 + their w.  One half alone where the other has no part.

        A learned variance is not guided: it is c's, and goes on only to a scheduler that has a use for it.
        """
        if w == 1:
            guided, variance = self._predict(z, t, labels)
        elif w == 0:
            guided, variance = self._predict(z, t, nulls)
        else:
            both, variances = self._predict(torch.cat([z, z]), t, torch.cat([nulls, labels]))
            u, c = both.chunk(2)
            guided, variance = u + w * (c - u), variances.chunk(2)[1]
        takes_variance = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return torch.cat([guided, variance], dim=1) if takes_variance else guided

    def _predict(self, z: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction [B,C,h,w], and the learned variance's channels: as many, or none."""
        condition = class_arguments(labels, self.unet.config["cross_attention_dim"], z.dtype)
        output = self.unet(z, t, **condition).sample
        channels = z.shape[1]
        return output[:, :channels], output[:, channels:]

    def _decode(self, z_0: Tensor, output_type: str) -> Any:
        shift = self.vae.config.get("shift_factor") or 0.0
        z = z_0.to(self.vae.dtype) / self.vae.config["scaling_factor"] + shift
        x = self.vae.decode(z).sample  # [B,3,H,W] in [-1,1]
        return self.image_processor.postprocess(x, output_type=output_type)

    def _generators(
        self,
        seeds: int | Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        count: int,
    ) -> torch.Generator | list[torch.Generator] | None:
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator came; one of them was wanted")
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + count)
        if seeds is not None:
            generator = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} seeds or generators came for {count} labels")
        return generator

    def _initial_noise(
        self, latents: Tensor | None, generator: torch.Generator | list[torch.Generator] | None, count: int
    ) -> Tensor:
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

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        """What this scheduler's `step` takes besides the usual."""
        known = inspect.signature(self.scheduler.step).parameters
        given = {"eta": eta, "generator": generator}
        return {name: value for name, value in given.items() if name in known}
