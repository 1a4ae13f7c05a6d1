"""
Where the embedding looks
=========================

With the operator ``"spatial"`` the continuous embedding attends over the quantised tokens of all scales. You can look
at the weights: in a model ``SERFFusion.attention_maps`` returns them, and this page calls the function behind it. The
weights are a softmax of cosines, so they are largest where a token is similar to the embedding.
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
# Four images have the same background and one patch of another kind each. They are quantised at two scales.

maps = background[None, :, None, None] + 0.1 * torch.randn(4, dim, size, size)
corners = [(1, 1), (6, 3), (3, 6), (9, 9)]
for each, (row, column) in zip(maps, corners, strict=True):
    each[:, row : row + 3, column : column + 3] += (patch - background)[:, None, None]
scales = [maps, avg_pool2d(maps, 3)]
quantizer = vqssl.MultiScaleQuantizer([dim, dim], codebook_size=16, dim=dim, projection="identity")
for _ in range(20):
    quantized = quantizer(scales).quantized

# %%
# The embedding is the patch's. Over all scales together, the weights sum to one.

tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in quantized], 1)
weights = spatial_attention_weights(patch.expand(4, dim), tokens)
fine, coarse = weights.split([size * size, 16], dim=1)
print("largest weight of a place:", [round(weight, 3) for weight in weights.amax(1).tolist()])

figure, grid = plt.subplots(2, 4, figsize=(8, 4), layout="constrained")
for column, (y, x) in enumerate(corners):
    for row, (each, side) in enumerate([(fine, size), (coarse, 4)]):
        axes, scale = grid[row, column], size / side
        shown = axes.imshow(each[column].view(side, side), cmap="magma", vmin=0, vmax=weights.max())
        corner = (x / scale - 0.5, y / scale - 0.5)
        axes.add_patch(Rectangle(corner, 3 / scale, 3 / scale, fill=False, color="C4", linewidth=2))
        axes.set(xticks=[], yticks=[])
grid[0, 0].set_ylabel("fine")
grid[1, 0].set_ylabel("coarse")
figure.colorbar(shown, ax=grid, label="weight of a place")
plt.show()

# %%
# In :class:`vqssl.SERFFusion` a learned map transforms the tokens first, and so decides where the embedding looks.
#
# .. warning::
#    Do not read too much into such a picture. A head that is trained to predict the embedding can also pass it on in
#    the weights themselves, and then looks at places that say nothing.
