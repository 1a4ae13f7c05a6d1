"""TransVW (TMI 2021): find patches that recur at a place, distort them, then name and restore them.

A visual word is a place together with the patches of the images that look most alike there: those nearest to a random
image. The method draws patches of the words in three sizes, distorts them, and learns cross-entropy x 0.01 (which
word) + MSE (the undistorted patch). Named "TransVW (2-D, PCA)": images are compared by PCA where fhaghighi/TransVW
trains an autoencoder, slices take the place of cubes, and the U-Net is this example's encoder with MONAI's decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kornia.geometry.transform as T
import numpy as np
import torch
from einops import repeat
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.decoder import Decoder
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.distort import distort
from examples.pretrain.methods.interface import Step


@dataclass(frozen=True)
class TransVWOptions:
    """Words and loss. The defaults are the release's."""

    words: int = 45
    """C, the number of visual words; a batch must hold as many patches at least."""
    members: int = 1000
    """Images of each word, or half of all images if they are fewer than twice as many."""
    sides: tuple[float, ...] = (0.4, 0.5, 0.6)
    """Sides of the patches, as shares of the image's."""
    components: int = 32
    """Of the PCA by which images are compared, at 32 pixels."""
    word_weight: float = 0.01
    """Of the cross-entropy beside the mean squared error."""
    title = "TransVW (2-D, PCA)"
    tuned = ("word_weight",)


class TransVW(nn.Module):
    """A U-Net that restores distorted patches, and a linear head that names their word."""

    Options = TransVWOptions

    def __init__(self, encoder: Encoder, options: TransVWOptions, *, total_steps: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.seed = seed
        self.encoder = encoder
        self.decoder = Decoder(encoder, encoder.resnet.conv1.in_channels)
        self.head = nn.Linear(encoder.dim, options.words)

    def prepare(self, images: Tensor) -> None:
        """Find the words in all training images `(N, C, S, S)`: a place, and the numbers of its members, for each."""
        rng = np.random.default_rng(self.seed)
        rows = F.adaptive_avg_pool2d(images, 32).flatten(1).numpy()
        pca = PCA(min(self.options.components, *rows.shape), random_state=self.seed)
        found = pca.fit_transform(rows)
        anchors = rng.choice(len(rows), self.options.words, replace=len(rows) < self.options.words)
        count = max(min(self.options.members, len(rows) // 2), 1)
        distance = ((found[anchors][:, None] - found[None]) ** 2).sum(-1)
        self.images = images
        self.members = torch.from_numpy(np.argsort(distance, 1, kind="stable")[:, :count])
        margin = max(self.options.sides) / 2
        self.places = torch.from_numpy(rng.uniform(margin, 1 - margin, (self.options.words, 2))).float()

    def views(self, images: Tensor, augment: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return one patch for each image of a batch, from members of the words in turns: `(B, C, S, S)`."""
        word = torch.arange(len(images)) % self.options.words
        member = self.members[word, torch.randint(self.members.shape[1], word.shape)]
        sides = torch.tensor(self.options.sides)[torch.randint(len(self.options.sides), word.shape)]
        size = images.shape[-1]
        corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
        boxes = size * (repeat(self.places[word], "b xy -> b 4 xy") + sides[:, None, None] / 2 * corners)
        source = self.images[member].to(images.device)
        return [T.crop_and_resize(source, boxes.to(images.device), (size, size))]

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of patches `(B, C, S, S)`; row i shows word i mod C.

        Raises:
            ValueError: a batch holds fewer patches than there are words, of which some would never be seen.
        """
        patches, words = torch.cat(list(views)), self.options.words
        if len(views[0]) < words:
            raise ValueError(
                f"--transvw.words must be at most the batch of a rank, {len(views[0])}, got {words}: give fewer words, "
                "or a larger --optimization.batch-size"
            )
        word = (torch.arange(len(views[0]), device=patches.device) % words).repeat(len(views))
        pyramid = self.encoder.pyramid(distort(patches))
        named = F.cross_entropy(self.head(pyramid[-1].mean((2, 3))), word)
        restored = F.mse_loss(self.decoder(pyramid, patches.shape[2:]), patches)
        return Step(self.options.word_weight * named + restored, {"word": named, "restoration": restored})

    def after_step(self) -> None:
        """Do nothing: there is no teacher."""

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}
