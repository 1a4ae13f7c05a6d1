"""The encoder of every method: MONAI's ResNet-18, which also returns feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

from examples.pretrain.ranges import check_distinct, check_range

STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class EncoderOptions:
    """The encoder, the same for all methods. The defaults are the paper's."""

    width: int = 64
    """Channels of the first stage, at least 8; a ResNet-18 has 64."""
    stem_stride: Literal[1, 2, 4] = 4
    """4: the usual stem, 7 x 7 with stride 2 and max-pooling. 1 and 2, for small images: 3 x 3 without pooling."""
    scales: tuple[str, ...] = ("layer2", "layer3", "layer4")
    """Stages whose maps are returned: those that DiSSECT quantises and some protocols look at."""


def check_encoder(options: EncoderOptions) -> None:
    """Raise ValueError unless every option is in its range."""
    # With fewer input channels than a vector of AVX2 holds, oneDNN's strided 1 x 1 convolution writes past its memory
    # in the backward pass: wrong gradients, a hang or a crash (uxlfoundation/oneDNN#6035, torch 2.13).
    check_range("--encoder.width", options.width, least=8)
    unknown = [scale for scale in options.scales if scale not in STAGES]
    if unknown:
        raise ValueError(f"--encoder.scales must be of {', '.join(STAGES)}, got {', '.join(unknown)}")
    check_distinct("--encoder.scales", options.scales)


class Encoder(nn.Module):
    """A ResNet-18 that returns pooled features and the maps of some stages.

    Args:
        channels: of the images, 1 or 3.
        options: width, stem and scales.

    >>> import torch
    >>> features, maps = Encoder(1, EncoderOptions(width=8))(torch.zeros(2, 1, 64, 64))
    >>> features.shape, [tuple(each.shape) for each in maps]
    (torch.Size([2, 64]), [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)])
    """

    def __init__(self, channels: int, options: EncoderOptions) -> None:
        super().__init__()
        usual = options.stem_stride == 4
        self.widths = [options.width * 2**stage for stage in range(4)]
        self.options = options
        self.scales = options.scales
        self.resnet = ResNet(
            "basic",
            [2, 2, 2, 2],
            self.widths,
            spatial_dims=2,
            n_input_channels=channels,
            conv1_t_size=7 if usual else 3,
            conv1_t_stride=2 if usual else options.stem_stride,
            no_max_pool=not usual,
            feed_forward=False,
            bias_downsample=False,
        )

    @property
    def dim(self) -> int:
        """Width of the pooled features."""
        return self.widths[-1]

    @property
    def scale_channels(self) -> list[int]:
        """Channels of the maps that :meth:`forward` returns."""
        return [self.widths[STAGES.index(scale)] for scale in self.scales]

    @property
    def pyramid_channels(self) -> list[int]:
        """Channels of the maps that :meth:`pyramid` returns."""
        return [*([self.widths[0]] if not self.resnet.no_max_pool else []), *self.widths]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages, fine to coarse, each half the size of the one before.

        The usual stem adds a map of its own, which comes first.
        """
        net = self.resnet
        x = net.act(net.bn1(net.conv1(images)))
        maps = []
        if not net.no_max_pool:
            maps.append(x)
            x = net.maxpool(x)
        for stage in STAGES:
            x = getattr(net, stage)(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(B, dim)` of images `(B, C, H, W)`, and the maps of `scales`."""
        maps = self.pyramid(images)[-len(STAGES) :]
        return maps[-1].mean((2, 3)), [maps[STAGES.index(scale)] for scale in self.scales]
