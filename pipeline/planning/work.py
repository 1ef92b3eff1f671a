"""What a U-Net is and does: parameters, floating-point operations, and what autograd keeps of each image.

All is counted on tensors without memory, in seconds and on any machine.  A multiply-add counts as two operations, and
matrix products, convolutions and attention are counted; norms, activations and sums are not (1% or less of the time's
arithmetic, though more of its memory traffic).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config_data import DataConfig
from pipeline.config_network import ConditioningConfig, TextConfig, UnetConfig
from pipeline.optim import orthogonal
from pipeline.unet import NUM_SIZES, build_unet

Precision = Literal["fp32", "bf16", "fp16", "bf16_weights"]
Build = Callable[[], Module]  # a network, on whatever device is the default one


@dataclass(frozen=True)
class Shape:
    """A U-Net and what goes into it, as far as its cost depends on them."""

    unet: UnetConfig
    conditioning: ConditioningConfig | None
    latent: tuple[int, int, int]  # C, h, w
    num_tokens: int  # L: 77 for CLIP's captions, 1 for a class
    learned_variance: bool = False
    pooled_width: int | None = None  # P, with two text encoders

    def build(self) -> UNet2DConditionModel:
        """The network, on whatever device is the default one."""
        return build_unet(
            self.unet,
            self.conditioning,
            self.latent,
            0,
            learned_variance=self.learned_variance,
            pooled_width=self.pooled_width,
        )

    def arguments(self, num_images: int, dtype: torch.dtype) -> dict[str, Any]:
        """Zeros that its forward takes: sample [B,C,h,w], timestep [B], tokens [B,L,D], a class [B], sizes."""
        has_class = self.conditioning is not None and self.conditioning.has_class
        rows = self.conditioning.num_classes + 1 if self.conditioning is not None else 1
        as_token = has_class and not self.unet.class_embedding
        width = rows if as_token else self.unet.cross_attention_dim
        given: dict[str, Any] = {
            "sample": torch.zeros(num_images, *self.latent, dtype=dtype),
            "timestep": torch.zeros(num_images),
            "encoder_hidden_states": torch.zeros(num_images, self.num_tokens, width, dtype=dtype),
        }
        if has_class and not as_token:
            given["class_labels"] = torch.zeros(num_images, dtype=torch.int64)
        if self.pooled_width is not None:
            pooled = torch.zeros(num_images, self.pooled_width, dtype=dtype)
            given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.zeros(num_images, NUM_SIZES)}
        return given


@dataclass(frozen=True)
class Operations:
    """Floating-point operations for one image."""

    forward: int
    training: int  # forward and backward; with gradient checkpointing, what is computed again too


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps from the forward pass for the backward pass: fixed + images × each."""

    fixed: int  # autocast's copies of the weights
    each_image: int
    again_each_image: int  # with gradient checkpointing: of the largest block that is computed again

    def of(self, num_images: int) -> int:
        """Bytes for a micro-batch of so many images."""
        return self.fixed + num_images * (self.each_image + self.again_each_image)


def num_parameters(build: Build) -> int:
    """Parameters of what a function builds, without its weights."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build().parameters())


def largest_block(shape: Shape) -> int:
    """Parameters of the largest level of the U-Net, which FSDP2 gathers at once."""
    with torch.device("meta"):
        unet = shape.build()
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return max(sum(weight.numel() for weight in block.parameters()) for block in blocks)


def count_operations(shape: Shape, *, checkpointing: bool) -> Operations:
    """Of one image: torch's counter over a forward and a backward pass on the meta device."""
    with torch.device("meta"):
        unet = _trained(shape, checkpointing)
        with FlopCounterMode(display=False) as counter:
            output = unet(**shape.arguments(1, torch.float32)).sample
            forward = int(counter.get_total_flops())
            output.sum().backward()
            return Operations(forward, int(counter.get_total_flops()))


def count_muon(weights: Iterable[Tensor]) -> int:
    """Of a step on each rank, whatever its images: what makes the updates of these weights orthogonal."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for weight in weights:
            orthogonal(torch.empty(1, *weight.flatten(1).shape))
        return int(counter.get_total_flops())


def count_forward(build: Build, ask: Callable[[Any], object]) -> int:
    """The same of a network's forward pass alone.  `ask`: calls it with tensors of one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        ask(build())
        return int(counter.get_total_flops())


def count_beside(
    data: DataConfig, text: TextConfig | None, autoencoder: Build | None, encoders: Sequence[Build], num_tokens: int
) -> int:
    """Of one image: what of the autoencoder and of the text encoders runs in each step.

    None, []: not known, and not counted.  An encoder that learns has a backward pass, too.
    """
    total, image = 0, (1, 3, data.image_size, data.image_size)
    if data.train_latents is None and autoencoder is not None:
        total += count_forward(autoencoder, lambda vae: vae.encode(torch.zeros(image)))
    if text is not None and text.embeddings == "online":
        words = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
        total += (3 if text.train else 1) * sum(count_forward(build, lambda model: model(words)) for build in encoders)
    return total


def count_projection(build: Build, block_out_channels: Sequence[int], side: int) -> int:
    """Of one image, forward and backward: what `train.alignment` learns at each place of the U-Net's middle.

    side: of the latents.
    """
    middle = -(-side // 2 ** (len(block_out_channels) - 1))  # rounded up, as strided convolutions do
    return 3 * count_forward(build, lambda head: head(torch.zeros(1, block_out_channels[-1], middle, middle)))


def measure_activations(shape: Shape, precision: Precision, *, checkpointing: bool) -> Activations:
    """The saved tensors of 1 and of 2 images, each storage once; they are linear in the images.

    The network itself is run, on tensors that only pretend to lie on a CPU, whose attention keeps no L×L matrix, like
    CUDA's fused kernels.  Left out: what exists for a moment inside the forward pass, the gradients of activations on
    their way back, workspaces of convolutions.
    """
    (one, block), (two, _) = (_saved(shape, precision, checkpointing, num_images) for num_images in (1, 2))
    each = two - one
    return Activations(one - each, each, block if checkpointing else 0)


def _saved(shape: Shape, precision: Precision, checkpointing: bool, num_images: int) -> tuple[int, int]:
    """Bytes saved by a forward pass, and by the largest residual or attention block of one without checkpointing."""
    bytes_saved = _forward_saved(shape, precision, checkpointing, num_images)
    largest = _forward_saved(shape, precision, False, num_images)[1] if checkpointing else 0
    return bytes_saved[0], largest


def _forward_saved(shape: Shape, precision: Precision, checkpointing: bool, num_images: int) -> tuple[int, int]:
    dtype = torch.bfloat16 if precision == "bf16_weights" else torch.float32
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        unet = _trained(shape, checkpointing, dtype)
        weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}  # pyright: ignore
        kept: dict[int, Tensor] = {}  # by storage; held, so that none is given to another tensor
        total, largest = 0, 0

        def keep(saved: Tensor) -> Tensor:
            nonlocal total
            storage = saved.untyped_storage()
            place: int = storage._cdata  # pyright: ignore
            if place not in weights and place not in kept:
                kept[place] = saved
                total += storage.nbytes()
            return saved

        before: dict[Module, int] = {}

        def enters(module: Module, args: Any) -> None:
            before[module] = total

        def leaves(module: Module, args: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, total - before[module])

        for module in unet.modules():
            if isinstance(module, ResnetBlock2D | Transformer2DModel):
                module.register_forward_pre_hook(enters)
                module.register_forward_hook(leaves)
        given = shape.arguments(num_images, dtype)
        if precision in ("bf16", "fp16"):
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            stack.enter_context(_NormsInFloat32())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved))
        output = unet(**given).sample
        del output
        return total, largest


class _NormsInFloat32(TorchFunctionMode):
    """Has the CPU's autocast do with norms what CUDA's does: their input is made fp32, and kept so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _trained(shape: Shape, checkpointing: bool, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = shape.build()
    finally:
        torch.set_default_dtype(usual)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()
