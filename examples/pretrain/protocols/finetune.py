"""Fine-tuning: encoder and linear head are trained together on the label subsets of the linear probe."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from examples.pretrain.augment import to_float, views_of
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.labels import label_subset, learnable, macro_auc
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject, lacking_labels


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the AUC (%) by share of the labels."""
    labels = subject.train.labels
    assert labels is not None
    found: Scores = {}
    for share in settings.shares:
        for draw in range(1 if share == 1 else settings.subsets):
            seed = settings.seed * 1000 + draw
            some = subject.train.subset(label_subset(labels, share, seed))
            found.setdefault(f"{100 * share:g}%", []).append(100 * finetuned(subject, some, settings, seed))
    return found


def finetuned(subject: Subject, train: ImageSet, settings: Settings, seed: int) -> float:
    """Return the macro AUC on the test images after `settings.steps` steps; the subject's encoder is not changed."""
    run, test = subject.run, subject.test
    assert train.labels is not None
    assert test.labels is not None
    torch.manual_seed(seed)
    device = run.config.device
    encoder = copy.deepcopy(subject.encoder).train()
    many = train.labels.ndim == 2
    classes = train.labels.shape[1] if many else int(max(train.labels.max(), test.labels.max())) + 1
    head = nn.Linear(encoder.dim, classes).to(device)
    loss_of = nn.BCEWithLogitsLoss() if many else nn.CrossEntropyLoss()
    labels = torch.from_numpy(train.labels).to(device)
    images = to_float(train.images).to(device)
    augment = views_of(train.images.shape[1], run.config.augmentation)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=settings.lr, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, settings.steps)
    for batch in batches(len(images), settings):
        with torch.no_grad():
            views = run.normalize(augment(images[batch]))
        logits = head(encoder(views)[0])
        target = labels[batch]
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits, target.float() if many else target).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        features = run.encode(to_float(test.images), encoder)
        logits = head(features.to(device)).cpu()
    scores = (logits if many else logits.softmax(-1)).double().numpy()
    kept = learnable(train.labels, test.labels)
    return macro_auc(test.labels[:, kept] if many else test.labels[:, None] == kept, scores[:, kept])


def batches(count: int, settings: Settings) -> Iterator[Tensor]:
    """Yield the indices of `settings.steps` batches: every image once before any comes again."""
    size = min(settings.batch_size, count)
    order = torch.randperm(count)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count)])
        batch, order = order[:size], order[size:]
        yield batch


PROTOCOL = Protocol("Fine-tuning of encoder and head: macro AUC (%) by share of the labels", measure, lacking_labels)
