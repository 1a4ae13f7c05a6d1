"""Batches that come in parts: codebooks see the tokens of all parts at once, as they see those of a whole batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import vqssl
from vqssl.types import MultiScaleQuantized, Quantized


class HeldCodebooks:
    """The codebooks of a model, which stay as they are while a batch passes in parts, and are updated after it.

    Known are `EMACodebook` and `MultiScaleQuantizer`, which forward passes of the model call.

    Args:
        model: it keeps a hook for as long as it lives.

    Raises:
        ValueError: the model has a quantiser that updates its codes in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.codebooks: list[vqssl.EMACodebook] = []
        self.tokens: dict[vqssl.EMACodebook, list[Tensor]] = {}
        self.indices: dict[vqssl.EMACodebook, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, vqssl.ResidualQuantizer | vqssl.ProductQuantizer):
                raise ValueError(
                    "--optimization.accumulate must be 1 for a method with a quantiser other than EMACodebook and "
                    f"MultiScaleQuantizer, got a {type(module).__name__} at {name}: give --optimization.accumulate 1"
                )
            if isinstance(module, vqssl.EMACodebook):
                self.codebooks.append(module)
                module.register_forward_hook(self._of_codebook)
            elif isinstance(module, vqssl.MultiScaleQuantizer):
                module.register_forward_hook(self._of_scales)

    @property
    def need_codes(self) -> bool:
        """True unless all codebooks are known to be initialised."""
        return any(codebook.needs_codes for codebook in self.codebooks)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the codes as they are, and note the tokens of each forward pass in training mode."""
        moving = [codebook for codebook in self.codebooks if not codebook.frozen]
        for codebook in self.codebooks:
            self.tokens[codebook], self.indices[codebook] = [], []
        for codebook in moving:
            codebook.check_ranks()  # before they are frozen: then they wait for no rank
            codebook.freeze()
        try:
            yield
        finally:
            for codebook in moving:
                codebook.freeze(False)

    def initialize_(self) -> None:
        """Draw the first codes of each codebook that has none from the tokens noted."""
        for codebook in self.codebooks:
            if self.tokens[codebook]:
                codebook.initialize_(torch.cat(self.tokens[codebook]))

    def update_(self) -> None:
        """Update all codebooks once, with the tokens noted."""
        seen = [codebook for codebook in self.codebooks if self.tokens[codebook]]
        tokens = [torch.cat(self.tokens[codebook]) for codebook in seen]
        vqssl.update_codebooks(seen, tokens, [torch.cat(self.indices[codebook]) for codebook in seen])
        for codebook in seen:  # they would stay in memory during the next batch
            self.tokens[codebook], self.indices[codebook] = [], []

    def _of_codebook(self, codebook: vqssl.EMACodebook, inputs: tuple[Any, ...], found: Quantized) -> None:
        if codebook.training and codebook.frozen:
            self._note(codebook, inputs[0], found.indices)

    @torch.no_grad()
    def _of_scales(
        self, quantizer: vqssl.MultiScaleQuantizer, inputs: tuple[Any, ...], found: MultiScaleQuantized
    ) -> None:
        if not quantizer.training:
            return
        for scale, (project, maps) in enumerate(zip(quantizer.projections, inputs[0], strict=True)):
            codebook = quantizer.codebook(scale)
            if codebook.frozen:
                tokens = project(maps if quantizer.channels_last else maps.movedim(1, -1))
                self._note(codebook, tokens, found.indices[scale])

    def _note(self, codebook: vqssl.EMACodebook, tokens: Tensor, indices: Tensor) -> None:
        self.tokens[codebook].append(tokens.detach().reshape(-1, tokens.shape[-1]))
        self.indices[codebook].append(indices.reshape(-1))


class KeptState:
    """The buffers of a model as they are now: BatchNorm's statistics, codebooks, centres, queues and counters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Set all buffers back."""
        for name, module in self.model.named_modules():
            # A codebook remembers beside its buffers that it has codes.
            if isinstance(module, vqssl.EMACodebook) and not self.buffers[f"{name}.initialized"]:
                module.reset_parameters()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])


@contextlib.contextmanager
def rehearsal(model: nn.Module, device: str) -> Iterator[None]:
    """Leave no trace of forward passes in buffers or torch's generators; without gradients and warnings."""
    kept = KeptState(model)
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* quantises by random codes")
        yield
    kept.restore_()
