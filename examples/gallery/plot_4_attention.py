"""
Where the embedding looks
=========================

With the operator ``"spatial"`` the continuous embedding attends over the quantised tokens of all scales, and the
weights can be looked at: ``SERFFusion.attention_maps`` in a model, and the function behind it here. The weights are a
softmax of cosines, so the embedding finds the places that are like it.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch.nn.functional import avg_pool2d, normalize

import vqssl
from vqssl.functional import spatial_attention_weights

torch.manual_seed(0)
dim, size = 32, 12
background, patch = normalize(torch.randn(2, dim), dim=1)

# %%
# Four images of one background, each with a patch of another kind, at two scales, quantised.

maps = background[None, :, None, None] + 0.1 * torch.randn(4, dim, size, size)
corners = [(1, 1), (6, 3), (3, 6), (9, 9)]
for each, (row, column) in zip(maps, corners, strict=True):
    each[:, row : row + 3, column : column + 3] += (patch - background)[:, None, None]
scales = [maps, avg_pool2d(maps, 3)]
quantizer = vqssl.MultiScaleQuantizer(
    [dim, dim], codebook_size=16, dim=dim, projection=lambda c, d: torch.nn.Identity()
)
for _ in range(20):
    quantized = quantizer(scales).quantized

# %%
# The embedding is that of the patch. Over all scales together the weights sum to one.

tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in quantized], 1)
weights = spatial_attention_weights(patch.expand(4, dim), tokens)
fine, coarse = weights.split([size * size, 16], dim=1)
print("largest weight of a place:", [round(weight, 3) for weight in weights.amax(1).tolist()])

figure, grid = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
for column, (y, x) in enumerate(corners):
    for row, (each, side) in enumerate([(fine, size), (coarse, 4)]):
        axes, scale = grid[row, column], size / side
        axes.imshow(each[column].view(side, side).detach(), cmap="magma", vmin=0)
        corner = (x / scale - 0.5, y / scale - 0.5)
        axes.add_patch(Rectangle(corner, 3 / scale, 3 / scale, fill=False, color="#4cc9f0", linewidth=2))
        axes.set(xticks=[], yticks=[])
grid[0, 0].set_ylabel("fine")
grid[1, 0].set_ylabel("coarse")
plt.show()

# %%
# In :class:`vqssl.SERFFusion` the tokens go through a learned map first, and where the embedding looks is what that map
# makes of them. Take such a picture for what it is: a head that is trained to predict the embedding can also use the
# weights themselves to pass it on, and then looks at places that tell nothing.
