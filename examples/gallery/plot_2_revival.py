"""
Dead codes, and what revival does about them
============================================

Codes that start far from the data get no token and never move: your codebook then says "usage is 5%". Here the first
codes are random numbers around zero. The tokens lie elsewhere, as the features of a trained encoder do.
"""

import matplotlib.pyplot as plt
import torch

import vqssl

torch.manual_seed(0)
mean = 4 * torch.randn(1, 16)


def tokens(count=1024):
    """Return tokens near a curved sheet of three dimensions in sixteen, away from zero."""
    flat = torch.randn(count, 3)
    bend = torch.sin(flat @ torch.linspace(-1, 1, 48).view(3, 16))
    return mean + bend + 0.05 * torch.randn(count, 16)


def trained(**options):
    """Train a codebook; return its perplexity and number of dead codes at each step."""
    codebook = vqssl.EMACodebook(codebook_size=256, dim=16, **options)
    history = []
    for _ in range(400):
        codebook(tokens())
        usage = codebook.usage()
        history.append((usage.perplexity.item(), usage.dead.item()))
    return history


runs = {
    "random codes, no revival": trained(initialization=vqssl.RandomInit(), revival=None),
    "random codes, revival": trained(initialization=vqssl.RandomInit()),
    "codes from tokens, no revival": trained(revival=None),
    "codes from tokens, revival (the default)": trained(),
}

# %%
# A code is dead if it gets less than a tenth of its fair share of the tokens. Counts start at one and decay by a
# hundredth a step. So a code without tokens counts as dead only after a while; revival then replaces it by a token.

figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for name, history in runs.items():
    for axes, values in zip(panels, zip(*history, strict=True), strict=True):
        axes.plot(values, label=name, linestyle="-" if "no revival" not in name else "--")
panels[0].set(title="perplexity, of 256", xlabel="step", ylim=(0, 256))
panels[1].set(title="dead codes", xlabel="step", ylim=(0, 256))
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %%
# With revival, the first codes do not matter.

for name, history in runs.items():
    print(f"{name}: perplexity {history[-1][0]:.0f}, dead {history[-1][1]}")
