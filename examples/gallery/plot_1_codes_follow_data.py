"""
Codes that follow the data
==========================

Here a codebook alone quantises points of the plane, where you can see it: four clusters drift, and the codes follow. No
optimizer is involved. In training mode every call updates the codes, as BatchNorm updates its statistics.
"""

import matplotlib.pyplot as plt
import torch

import vqssl
from examples.pretrain.reports.code_colors import code_colors

torch.manual_seed(0)
codebook = vqssl.EMACodebook(codebook_size=32, dim=2, decay=0.9)


def points(step):
    """Return 512 points around four centres that turn slowly."""
    angle = torch.tensor([0.0, 0.25, 0.5, 0.75]) * 2 * torch.pi + step / 60
    centres = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    return centres[torch.randint(4, (512,))] + 0.5 * torch.randn(512, 2)


# %%
# Three of ninety steps. A token has the colour of its code, and near codes have near colours. The size of a code shows
# how many tokens it gets.

figure, panels = plt.subplots(1, 3, figsize=(8, 2.9), sharex=True, sharey=True, layout="constrained")
for step in range(91):
    x = points(step)
    quantized, indices, loss = codebook(x)
    if step in (0, 30, 90):
        axes = panels[(0, 30, 90).index(step)]
        axes.scatter(*x.T, s=4, c=code_colors(codebook.embed.numpy())[indices], linewidths=0)
        axes.scatter(*codebook.embed.T, s=6 * codebook.cluster_size, c="black", alpha=0.75, linewidths=0)
        axes.set_title(f"step {step}:\nperplexity {codebook.usage().perplexity:.0f} of 32")
        axes.set_aspect("equal")

# %%
# A call returns the nearest code of each token, its index, and a loss that draws the tokens to the codes. The gradient
# passes straight through to the tokens.

x = points(90).requires_grad_()
quantized, indices, loss = codebook.eval()(x)
assert torch.equal(quantized, codebook.embed[indices])
quantized.sum().backward()
assert torch.equal(x.grad, torch.ones_like(x))
