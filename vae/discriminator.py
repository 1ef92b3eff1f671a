"""The adversary of the autoencoder's training: a network that says of every patch of an image how real it looks."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import DiscriminatorConfig

KERNEL_SIZE = 4
SLOPE = 0.2  # of LeakyReLU below 0
WIDEST = 8  # the largest width, in base widths


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """PatchGAN (Isola et al. 2017, appendix 6.1.2): 4×4 convolutions, n of stride 2 and two of stride 1, LeakyReLU.

    A logit sees one patch of `patch_size` pixels a side and nothing else.  So there is no normalisation at all: the
    paper's BatchNorm makes a logit depend on the other images of the micro batch, and GroupNorm on all of its own
    image; both also hide the contrast, in which a blurred image differs.  The weights are drawn as He et al. 2015
    (eq. 15) do without it, and its task of keeping D smooth is that of the R1 penalty.

    With classes, the projection of Miyato & Koyama 2018, f(x, y) = yᵀVφ(x) + ψ(φ(x)), at every patch: φ is the mean of
    the last features over the window that the last convolution, ψ, sees there.

    A diffusers model: `save_pretrained`, `from_pretrained`, `config`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_downsamplings: int = 3,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = [base_channels * min(2**level, WIDEST) for level in range(num_downsamplings + 1)]
        strides = [2] * num_downsamplings + [1]
        self.patch_size = _patch_size(strides)
        self.smallest_side = DiscriminatorConfig(num_downsamplings=num_downsamplings).smallest_side
        self.convs = nn.ModuleList(
            nn.Conv2d(num_in, num_out, KERNEL_SIZE, stride, padding=1)
            for num_in, num_out, stride in zip([in_channels, *widths], widths, strides, strict=False)
        )
        self.conv_out = nn.Conv2d(widths[-1], 1, KERNEL_SIZE, padding=1)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Activations keep their variance from layer to layer, so that logits begin near the size of the pixels."""
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, a=SLOPE)
            _zero_bias(conv)
        nn.init.kaiming_normal_(self.conv_out.weight, nonlinearity="linear")
        _zero_bias(self.conv_out)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=self.class_embedding.embedding_dim**-0.5)

    def features(self, x: Tensor) -> Tensor:
        """φ: x [B,3,H,W] → [B,D,h'+1,w'+1].  ValueError: another number of channels, or too small for one patch."""
        num_channels = self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != num_channels or min(x.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"images {list(x.shape)} came, [B,{num_channels},H,W] with sides of at least {self.smallest_side} "
                "are wanted; fewer num_downsamplings see smaller images"
            )
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
        return x

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """x [B,3,H,W] in [-1,1]; classes int64 [B], where built with num_classes → logits [B,1,h',w'], real above 0.

        h' = H // 2**num_downsamplings - 2, and w' likewise; in x's dtype, which is that of the weights.

        Raises ValueError: images of another shape (see `features`), classes missing, unwanted or not one per image.
        """
        features = self.features(x)
        logits = self.conv_out(features)  # [B,1,h',w']
        if self.class_embedding is None:
            if classes is not None:
                raise ValueError("classes came, none are wanted: this discriminator has no num_classes")
            return logits
        if classes is None or classes.shape != x.shape[:1]:
            came = "no classes" if classes is None else f"classes {list(classes.shape)}"
            raise ValueError(f"{came} came, one for each of {len(x)} images is wanted")
        windows = F.avg_pool2d(features, KERNEL_SIZE, stride=1, padding=1)  # [B,D,h',w']
        return logits + torch.einsum("bd,bdhw->bhw", self.class_embedding(classes), windows).unsqueeze(1)


def build_discriminator(
    config: DiscriminatorConfig, in_channels: int, seed: int, *, num_classes: int | None = None
) -> PatchDiscriminator:
    """A fresh fp32 discriminator in training mode, a function of the arguments; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = PatchDiscriminator(
            in_channels=in_channels,
            base_channels=config.base_channels,
            num_downsamplings=config.num_downsamplings,
            num_classes=num_classes,
        )
    return discriminator.train()


def _patch_size(strides: list[int]) -> int:
    """Pixels along one side that one logit sees."""
    size = KERNEL_SIZE  # of conv_out, in positions of the features
    for stride in reversed(strides):
        size = (size - 1) * stride + KERNEL_SIZE
    return size


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
