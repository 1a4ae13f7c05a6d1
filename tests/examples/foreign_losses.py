"""Losses of the example's methods against lightly's. test_foreign_losses.py runs this file beside lightly.

``python -m tests.examples.foreign_losses`` runs every check and prints the names of those that pass.
"""

import sys
import traceback
from importlib import import_module

import torch
from torch.nn import functional as F

from examples.pretrain.methods.key_queue import KeyQueue
from examples.pretrain.methods.losses import (
    covariance_loss,
    distillation,
    hidden_cells,
    info_nce,
    koleo,
    over_pairs,
    variance_loss,
    vicreg,
)
from examples.pretrain.methods.pcrlv2 import minus_cosine
from examples.pretrain.methods.prototypes import SharpTargets
from tests.interop.foreign import make_torchvision_importable


def loss_of(name, *arguments, **options):
    return getattr(import_module("lightly.loss"), name)(*arguments, **options)


def dinos_loss_is_lightlys():
    """With two views of the teacher and four of the student, three steps of the running centre."""
    theirs, targets = loss_of("DINOLoss", 12, teacher_temp=0.07), SharpTargets(12, 0.07)
    for _ in range(3):
        taught, seen = [torch.randn(5, 12) for _ in range(2)], [torch.randn(5, 12) for _ in range(4)]
        # lightly's starts at zero and moves after a step, ours is set by the first batch and moves before it.
        theirs.center.copy_(targets.centring.centre)
        targets.eval()
        ours = over_pairs(distillation, seen, targets(torch.cat(taught)).chunk(2))
        torch.testing.assert_close(ours, theirs(taught, seen))
        targets.train()(torch.cat(taught))
        if targets.centring.num_updates > 1:
            torch.testing.assert_close(theirs.center[0, 0], targets.centring.centre)


def ibots_loss_is_lightlys():
    theirs = loss_of("IBOTPatchLoss", 12, teacher_temp=0.05)
    taught, seen = torch.randn(6, 4, 4, 12), torch.randn(6, 4, 4, 12)
    hidden = torch.rand(6, 4, 4) < torch.linspace(0, 0.9, 6)[:, None, None]
    ours = hidden_cells(seen, (taught / 0.05).softmax(-1), hidden)
    torch.testing.assert_close(ours, theirs(taught[hidden], seen[hidden], hidden))


def koleo_is_lightlys():
    rows = torch.randn(16, 6, requires_grad=True)
    ours = torch.autograd.grad(koleo(rows), rows)[0]
    torch.testing.assert_close(koleo(rows), loss_of("KoLeoLoss")(rows))
    torch.testing.assert_close(ours, torch.autograd.grad(loss_of("KoLeoLoss")(rows), rows)[0])


def vicreg_is_lightlys():
    a, b = torch.randn(2, 16, 6)
    torch.testing.assert_close(vicreg(a, b), loss_of("VICRegLoss")(a, b))
    pieces = import_module("lightly.loss.vicreg_loss")
    torch.testing.assert_close(variance_loss(a / 2), pieces.variance_loss(a / 2))
    torch.testing.assert_close(covariance_loss(a), pieces.covariance_loss(a))


def mocos_loss_and_queue_are_lightlys():
    """Over more steps than the queue has room for."""
    theirs, queue = loss_of("NTXentLoss", temperature=0.2, memory_bank_size=(24, 6)), KeyQueue(24, 6)
    theirs(torch.randn(2, 6), torch.randn(2, 6))  # makes its bank
    theirs.memory_bank.bank.copy_(queue.keys)
    theirs.memory_bank.bank_ptr.zero_()
    for _ in range(5):
        query, key = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
        ours = info_nce(query, key, queue.keys)
        queue.put(key)
        torch.testing.assert_close(ours, theirs(query, key))
    torch.testing.assert_close(queue.keys, theirs.memory_bank.bank)


def pcrlv2s_cosine_is_lightlys():
    a, b = torch.randn(2, 8, 6)
    torch.testing.assert_close(minus_cosine(a, b), loss_of("NegativeCosineSimilarity")(a, b))
    torch.testing.assert_close(minus_cosine(a, b), -(F.normalize(a) * F.normalize(b)).sum(1).mean())


CHECKS = (
    dinos_loss_is_lightlys,
    ibots_loss_is_lightlys,
    koleo_is_lightlys,
    vicreg_is_lightlys,
    mocos_loss_and_queue_are_lightlys,
    pcrlv2s_cosine_is_lightlys,
)

if __name__ == "__main__":
    registered = make_torchvision_importable()  # the operators exist as long as this reference
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except Exception:  # the other checks still run
            traceback.print_exc(file=sys.stderr)
        else:
            print(check.__name__, flush=True)
