"""A logistic regression on frozen features, by share of the labels."""

from __future__ import annotations

from examples.pretrain.probe import probe_encoder
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject, lacking_labels


def measure(subject: Subject, settings: Settings) -> Scores:
    found = probe_encoder(
        subject.run,
        subject.encoder,
        subject.train,
        subject.test,
        fractions=settings.shares,
        subsets=settings.subsets,
        seed=settings.seed,
    )
    return {f"{100 * float(share):g}%": [100 * value for value in values] for share, values in found.items()}


PROTOCOL = Protocol("Linear probe of the frozen encoder: macro AUC (%) by share of the labels", measure, lacking_labels)
