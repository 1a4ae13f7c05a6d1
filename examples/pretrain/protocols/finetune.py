"""Fine-tuning: encoder and linear head are trained together on the label subsets of the linear probe."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from examples.pretrain.augment import to_float, views_of
from examples.pretrain.data import ImageSet
from examples.pretrain.divergence import check_losses, check_state
from examples.pretrain.protocols.labels import transfer_auc
from examples.pretrain.protocols.subject import (
    Protocol,
    Scores,
    Settings,
    Subject,
    label_subsets,
    lacking_labels,
)


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the AUC (%) by share of the labels."""
    found: Scores = {}
    for share, seed, index in label_subsets(subject, settings):
        some = subject.train.subset(index)
        found.setdefault(f"{100 * share:g}%", []).append(100 * finetuned(subject, some, settings, seed))
    return found


def finetuned(subject: Subject, train: ImageSet, settings: Settings, seed: int) -> float:
    """Return the macro AUC on the test images after `settings.steps` steps; the subject's encoder is not changed.

    Raises:
        Diverged: the loss or the weights are not finite.
    """
    run, test = subject.run, subject.test
    assert train.labels is not None
    assert test.labels is not None
    torch.manual_seed(seed)
    device = run.config.device
    encoder = copy.deepcopy(subject.encoder).train()
    many = train.labels.ndim == 2
    classes = np.arange(train.labels.shape[1]) if many else np.unique(train.labels)
    targets = train.labels if many else np.searchsorted(classes, train.labels)
    head = nn.Linear(encoder.dim, len(classes)).to(device)
    of_findings = nn.BCEWithLogitsLoss() if (train.labels >= 0).all() else known_findings_loss
    loss_of = of_findings if many else nn.CrossEntropyLoss()
    labels = torch.from_numpy(targets).to(device)
    augment = views_of(train.images.shape[1], run.config.augmentation)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=settings.lr, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, settings.steps)
    losses = []
    for batch in batches(len(train), settings):
        with torch.no_grad():
            # Read for each batch: images may be more than memory holds.
            views = run.normalize(augment(to_float(train.images[batch.numpy()]).to(device)))
        logits = head(encoder(views)[0])
        target = labels[batch]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(logits, target.float() if many else target)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        schedule.step()
    said = {"of": f"fine-tuning of {subject.name}", "advice": f"Give a smaller --lr than {settings.lr:g}"}
    check_losses(torch.stack(losses)[:, None], ["loss"], **said)
    check_state({"encoder": encoder, "head": head}, **said)
    with torch.no_grad():
        features = run.encode(to_float(test.images), encoder)
        logits = head(features.to(device)).cpu()
    scores = (logits if many else logits.softmax(-1)).double().numpy()
    return transfer_auc(train.labels, test.labels, classes, scores)


def known_findings_loss(logits: Tensor, findings: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over the findings that are known; 0 if none is.

    Args:
        logits: `(B, L)`.
        findings: `(B, L)` of 0 and 1, and -1 where unknown.

    >>> known_findings_loss(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])).item()
    0.6931471824645996
    """
    known = findings >= 0
    each = F.binary_cross_entropy_with_logits(logits, findings.clamp_min(0), known.to(logits.dtype), reduction="sum")
    return each / known.sum().clamp_min(1)


def batches(count: int, settings: Settings) -> Iterator[Tensor]:
    """Yield the indices of `settings.steps` batches: every image once before any comes again."""
    size = min(settings.batch_size, count)
    order = torch.randperm(count)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count)])
        batch, order = order[:size], order[size:]
        yield batch


PROTOCOL = Protocol(
    "Fine-tuning of encoder and head: macro AUC (%) by share of the labels",
    measure,
    lacking_labels,
    draws=label_subsets,
)
