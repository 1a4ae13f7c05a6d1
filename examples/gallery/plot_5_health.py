"""
Is it healthy?
==============

:mod:`vqssl.health` examines every codebook of a model or of a checkpoint, and says what to do. Here are three with the
same tokens: one as it comes; one whose codes began far away from the tokens and were never revived; one that was given
many more codes than there are different tokens.
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
    return 3 + torch.randn(count, 6) @ torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


model = nn.ModuleDict(
    {
        "as it comes": vqssl.EMACodebook(64, 16),
        "far away": vqssl.EMACodebook(64, 16, initialization=vqssl.RandomInit(), revival=None),
        "too many": vqssl.EMACodebook(64, 16),
    }
)
for _ in range(600):
    model["as it comes"](tokens())
    model["far away"](tokens())
    model["too many"](few[torch.randint(12, (1024,))] + 1e-3 * torch.randn(1024, 16))

# %%
# ``examine`` measures, ``show`` prints what it found. On the command line this is ``python -m vqssl.health
# CHECKPOINT``.

reports = vqssl.health.examine(model)
vqssl.health.show(reports, width=100)

# %%
# The same as a page, which ``--picture`` makes: how often codes are used, in the order of their use; how far each is
# from the next one; and in how many directions they spread.

with tempfile.TemporaryDirectory() as folder:
    page = Path(folder) / "health.png"
    vqssl.health.draw(reports, page)
    picture = plt.imread(page)

figure = plt.figure(figsize=(picture.shape[1] / 150, picture.shape[0] / 150))
axes = figure.add_axes((0, 0, 1, 1))
axes.imshow(picture)
axes.axis("off")
plt.show()
