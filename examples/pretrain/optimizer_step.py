"""A step of the optimizer: a batch in one or several parts, in single or half precision, compiled or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from examples.pretrain.accumulation import HeldCodebooks, KeptState, rehearsal
from examples.pretrain.methods import Step
from examples.pretrain.optimization import Optimization
from examples.pretrain.precision import computing
from vqssl import EMACodebook

Part = Callable[[], list[Tensor]]
"""Draws the views of a part of a batch."""
FIRST_SCALE = 2.0**8
"""Of the loss in fp16: the gradients of every method fit at their first step. It doubles after 2,000 steps that fit."""


class OptimizerStep:
    """Forward passes, backward passes and what follows them, as the options say.

    In fp16 the loss is scaled. A step whose gradients overflow is skipped: weights, optimizer, schedule, teacher,
    codebooks and BatchNorm's statistics are then as they were before it.

    Args:
        method: a `Method`.
        optimizer: of its parameters.
        scheduler: of the learning rate.
        config: the options.
        device: of the method.

    Raises:
        ValueError: `config.accumulate` does not suit the method.
    """

    def __init__(
        self, method: Any, optimizer: Optimizer, scheduler: LRScheduler, config: Optimization, device: str
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.config = config
        self.device = device
        self.held = HeldCodebooks(method) if config.accumulate > 1 else None
        kind = torch.device(device).type
        self.scaler = torch.amp.GradScaler(kind, init_scale=FIRST_SCALE) if config.precision == "fp16" else None
        self.skipped = 0
        """Steps that overflowed so far."""
        self.is_compiled = False

    def take(self, forward: nn.Module, parts: Sequence[Part]) -> Step | None:
        """Take a step with the views of all parts; return the means of loss and figures, or None if it overflowed.

        Args:
            forward: the method, or the module that wraps it for several ranks.
            parts: `config.accumulate` of them, of as many images each.
        """
        if self.held is not None and self.held.need_codes:
            self._first_codes(self.held, parts)
        self._compile_once()
        before = None if self.scaler is None else KeptState(self.method)
        self.optimizer.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if self.held is None else self.held.held():
            steps = [self._pass(forward, part, last=part is parts[-1]) for part in parts]
        if self.scaler is None:
            self.optimizer.step()
        elif self._overflows(self.scaler):
            assert before is not None
            before.restore_()
            self.skipped += 1
            return None
        self.scheduler.step()
        if self.held is not None:
            self.held.update_()
        self.method.after_step()
        return mean_of(steps)

    def _pass(self, forward: nn.Module, part: Part, *, last: bool) -> Step:
        views = part()  # before autocast: images are not blurred in half precision
        several = isinstance(forward, DistributedDataParallel) and not last
        # The ranks average their gradients once, after the last part.
        with forward.no_sync() if several else contextlib.nullcontext():  # type: ignore[operator]
            with computing(self.config, self.device):
                step: Step = forward(views)
            loss = step.loss if self.config.accumulate == 1 else step.loss / self.config.accumulate
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return Step(logged(step.loss), {name: logged(value) for name, value in step.parts.items()})

    def _overflows(self, scaler: torch.amp.GradScaler) -> bool:
        """Step the optimizer unless a gradient is not finite; return True if one is not, on all ranks alike."""
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() < scale

    def _first_codes(self, held: HeldCodebooks, parts: Sequence[Part]) -> None:
        """Initialise the codebooks from all parts, as a whole batch does."""
        with rehearsal(self.method, self.device), held.held():
            for part in parts:
                views = part()
                with computing(self.config, self.device):
                    self.method(views)
        held.initialize_()

    def _compile_once(self) -> None:
        """Compile the method's forward pass, once its codebooks have codes: drawing them would break the graph."""
        if not self.config.compile or self.is_compiled:
            return
        codebooks = [module for module in self.method.modules() if isinstance(module, EMACodebook)]
        if any(codebook.needs_codes for codebook in codebooks):
            return
        # What was compiled before, for another run, would decide how this one is compiled, and so how it rounds.
        torch.compiler.reset()
        self.method.compile(dynamic=False)
        self.is_compiled = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it: empty but in fp16."""
        return {} if self.scaler is None else {"skipped": self.skipped, **self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint holds."""
        if self.scaler is not None:
            self.skipped = state["skipped"]
            self.scaler.load_state_dict(state)


def logged(value: Tensor) -> Tensor:
    """Return a figure without its graph, in float32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def mean_of(steps: Sequence[Step]) -> Step:
    """Return the means of loss and figures over the parts of a batch.

    >>> one, two = (Step(torch.tensor(x), {"part": torch.tensor(2 * x)}) for x in (1.0, 2.0))
    >>> mean_of([one, two])
    Step(loss=tensor(1.5000), parts={'part': tensor(3.)})
    """
    if len(steps) == 1:
        return steps[0]
    losses = torch.stack([step.loss for step in steps]).mean()
    return Step(losses, {name: torch.stack([step.parts[name] for step in steps]).mean() for name in steps[0].parts})
