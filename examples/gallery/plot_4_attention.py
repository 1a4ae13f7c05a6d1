"""
Where the embedding looks
=========================

With the operator ``"spatial"`` of :class:`vqssl.SERFFusion` the continuous embedding attends over the quantised tokens
of all scales, and the weights can be looked at. Each image here has one patch of another kind, and the embedding is
that of the patch, so the places of the patch are what it finds.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

import vqssl

torch.manual_seed(0)
dim, size = 16, 12
background, patch = torch.nn.functional.normalize(torch.randn(2, dim), dim=1)

maps = background[None, :, None, None] + 0.2 * torch.randn(4, dim, size, size)
corners = [(1, 1), (6, 2), (3, 7), (8, 8)]
for number, (row, column) in enumerate(corners):
    maps[number, :, row : row + 3, column : column + 3] += patch[:, None, None] - background[:, None, None]
coarse = torch.nn.functional.avg_pool2d(maps, 3)

fusion = vqssl.SERFFusion(dim=dim, num_scales=2, hidden_dim=64)
z_c = patch.expand(4, dim)
refined = fusion(z_c, [maps, coarse])
print("refined target:", tuple(refined.shape))

# %%
# One map of weights for each scale; over all scales together they sum to one.

weights = fusion.attention_maps(z_c, [maps, coarse])
print([tuple(each.shape) for each in weights], "sum", sum(each[0].sum() for each in weights).item())

figure, grid = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
for column, (fine, rough) in enumerate(zip(*weights, strict=True)):
    for row, each in enumerate((fine, rough)):
        grid[row, column].imshow(each.detach(), cmap="magma", vmin=0)
        grid[row, column].set(xticks=[], yticks=[])
    y, x = corners[column]
    grid[0, column].add_patch(Rectangle((x - 0.5, y - 0.5), 3, 3, fill=False, color="#4cc9f0", linewidth=2))
grid[0, 0].set_ylabel("fine")
grid[1, 0].set_ylabel("coarse")
plt.show()
