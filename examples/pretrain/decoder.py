"""A U-Net decoder (MONAI's) on the stages of an encoder: for segmentation, and for methods that restore images."""

from __future__ import annotations

from monai.networks.nets.flexible_unet import SegmentationHead, UNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.encoder import Encoder


class Decoder(nn.Module):
    """Maps of all stages, as `Encoder.pyramid` returns them, to an image `(B, P, S, S)`.

    Args:
        encoder: whose maps are decoded; only its widths are read.
        channels: P, of the image.
        skips: False uses the coarsest map alone.

    >>> import torch
    >>> from examples.pretrain.encoder import EncoderOptions
    >>> encoder = Encoder(1, EncoderOptions(width=8, stem_stride=2))
    >>> images = torch.zeros(2, 1, 32, 32)
    >>> Decoder(encoder, 3)(encoder.pyramid(images), images.shape[2:]).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, encoder: Encoder, channels: int, *, skips: bool = True) -> None:
        super().__init__()
        widths = encoder.pyramid_channels
        self.skips = skips
        self.widths = [max(width, 16) for width in [*widths[-2::-1], widths[0]]]
        """Channels of the maps that :meth:`maps` returns."""
        self.blocks = UNetDecoder(
            spatial_dims=2,
            # The decoder ignores the first, the image's own.
            encoder_channels=[1, *(widths[:-1] if skips else [0] * (len(widths) - 1)), widths[-1]],
            decoder_channels=self.widths,
            act=("relu", {"inplace": True}),
            norm="batch",
            dropout=0.0,
            bias=False,
            upsample="nontrainable",
            pre_conv="default",
            interp_mode="nearest",
            align_corners=None,
            is_pad=True,
        ).blocks
        self.head = SegmentationHead(2, self.widths[-1], channels)

    def maps(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the decoded maps, coarse to fine, each twice the size of the one before."""
        *finer, x = pyramid
        found = []
        for block in self.blocks:
            x = block(x, finer.pop() if finer and self.skips else None)
            found.append(x)
        return found

    def image(self, decoded: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the image of the finest decoded map."""
        image = self.head(decoded)
        # The decoder ends at twice the size of the first stage, which exceeds the image if the stem has stride 1.
        return image if image.shape[2:] == size else F.interpolate(image, size)

    def forward(self, pyramid: list[Tensor], size: tuple[int, ...]) -> Tensor:
        """Return the image, of `size`."""
        return self.image(self.maps(pyramid)[-1], size)
