"""
Code maps of a feature pyramid
==============================

``MultiScaleQuantizer`` takes the feature maps of an encoder as they are, and gives each scale its own codes. Here an
untrained encoder sees generated thorax phantoms. Its codes already follow the anatomy, because a random filter responds
similarly to similar places. (``python3 examples`` trains an encoder, and draws the same picture.)
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import vqssl
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.reports.code_colors import code_colors

torch.manual_seed(0)
phantoms = make_phantoms(64, 64, seed=3)
images = torch.from_numpy(phantoms.images).float()[:, None] / 255
lesions = torch.as_tensor(phantoms.masks).numpy() > 0


def block(channels, width):
    """Return a strided convolution with BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


stages = nn.ModuleList([block(1, 32), block(32, 64), block(64, 128)])
quantizer = vqssl.MultiScaleQuantizer([32, 64, 128], codebook_size=16, dim=32)

# %%
# In training mode each call updates the codes. Maps have their channels first and any spatial size; the indices have
# the same size.

with torch.no_grad():
    for _ in range(60):
        x = images[torch.randperm(64)[:32]]
        maps = [x := stage(x) for stage in stages]
        out = quantizer(maps)
print([tuple(each.shape) for each in maps], "->", [tuple(each.shape) for each in out.indices])
print("perplexity by scale:", [f"{quantizer.codebook(scale).usage().perplexity:.1f} of 16" for scale in range(3)])

# %%
# Equal colours within a row are equal codes, and near colours are near codes. A lesion is outlined in every row.

with torch.no_grad():
    x = images[:6]
    maps = [x := stage(x) for stage in stages.eval()]
    indices = quantizer.eval()(maps).indices
figure, grid = plt.subplots(4, 6, figsize=(8, 5.6), layout="constrained")
for column in range(6):
    grid[0, column].imshow(images[column, 0], cmap="gray")
    for row, codes in enumerate(indices, 1):
        palette = code_colors(quantizer.codebook(row - 1).embed.numpy())
        grid[row, column].imshow(palette[codes[column]], extent=(-0.5, 63.5, 63.5, -0.5))
    if lesions[column].any():
        for axes in grid[:, column]:
            color = "C5" if axes is grid[0, column] else "black"
            axes.contour(lesions[column], levels=[0.5], colors=color)
for axes in grid.flat:
    axes.set(xticks=[], yticks=[])
for row, name in enumerate(["image", "fine", "medium", "coarse"]):
    grid[row, 0].set_ylabel(name)
plt.show()
