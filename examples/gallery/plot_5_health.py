"""
Is it healthy?
==============

:mod:`vqssl.health` examines every codebook of a model or a checkpoint, and says what to do. Here are three codebooks:

- one with default options;
- one with the same tokens, but whose codes start far away from them and are never revived;
- one with many more codes than there are distinct tokens.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import vqssl
import vqssl.health

torch.manual_seed(0)
few = torch.randn(12, 16)


def tokens(count=1024):
    """Return tokens that fill 6 of their 16 dimensions, away from the origin."""
    return 3 + torch.randn(count, 6) @ torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


model = nn.ModuleDict(
    {
        "default": vqssl.EMACodebook(codebook_size=64, dim=16),
        "far away": vqssl.EMACodebook(codebook_size=64, dim=16, initialization=vqssl.RandomInit(), revival=None),
        "too many": vqssl.EMACodebook(codebook_size=64, dim=16),
    }
)
for _ in range(600):
    model["default"](tokens())
    model["far away"](tokens())
    model["too many"](few[torch.randint(12, (1024,))] + 1e-3 * torch.randn(1024, 16))

# %%
# ``examine`` measures the codebooks, and ``show`` prints the measures and the verdict. For a file, the command
# ``python -m vqssl.health CHECKPOINT`` does both.

reports = vqssl.health.examine(model)
vqssl.health.show(reports, width=100)

# %%
# ``draw`` writes the same as a page, as ``--picture`` does on the command line: how often codes are used, most used
# first; the distance from each code to the nearest other one; and in how many directions the codes spread.

with tempfile.TemporaryDirectory() as folder:
    page = Path(folder) / "health.png"
    vqssl.health.draw(reports, page)
    picture = plt.imread(page)

figure = plt.figure(figsize=(picture.shape[1] / 150, picture.shape[0] / 150))
axes = figure.add_axes((0, 0, 1, 1))
axes.imshow(picture)
axes.axis("off")
plt.show()
