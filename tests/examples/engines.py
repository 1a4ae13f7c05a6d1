"""The drop-in model on two ranks: by hand, under Lightning and under Accelerate. test_engines.py compares them.

`torchrun --nproc-per-node 2 -m tests.examples.engines FOLDER` writes what each rank ends with. Lightning and Accelerate
are not in the environment of the tests: see `tests.foreign_libraries`.
"""

import datetime
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from examples.drop_in.byol import Model
from examples.drop_in.data import pairs
from tests.interop.foreign import make_torchvision_importable

STEPS = 8


def batches():
    """Return this rank's half of each batch, two views each."""
    torch.manual_seed(0)
    rank, size = dist.get_rank(), dist.get_world_size()
    return [tuple(view[rank::size] for view in views) for views in pairs(STEPS)]


def state_of(model):
    """Return all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def fresh(kind=Model):
    """Return the model and its optimizer, the same on all ranks."""
    torch.manual_seed(0)
    model = kind(STEPS)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def by_hand():
    """Train the plain script's model as a user of DistributedDataParallel would."""
    model, optimizer = fresh()
    wrapped = DistributedDataParallel(model)
    losses = []
    for views in batches():
        loss = wrapped(torch.cat(views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher()
        losses.append(loss.item())
    return {"losses": losses, "state": state_of(model)}


def with_accelerate():
    """Train the plain script's model with the four lines of Accelerate."""
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(*fresh())
    losses = []
    for views in batches():
        loss = wrapped(torch.cat(views))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.unwrap_model(wrapped).update_teacher()
        losses.append(loss.item())
    model = accelerator.unwrap_model(wrapped)
    return {"losses": losses, "state": state_of(model), "ranks": accelerator.num_processes}


def with_lightning():
    """Train the guide's LightningModule with `devices=2`."""
    model, _ = fresh(import_module("examples.drop_in.lightning_module").Model)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = import_module("lightning").Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, use_distributed_sampler=False, **quiet
    )
    trainer.fit(model, DataLoader(batches(), batch_size=None))
    return {"losses": model.losses, "state": state_of(model), "ranks": trainer.world_size}


def main(folder):
    """Train in all three ways in one process group, and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    rank = dist.get_rank()
    found = {train.__name__: train() for train in (by_hand, with_accelerate, with_lightning)}
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    registered = make_torchvision_importable()  # unregistered when garbage-collected
    main(Path(sys.argv[1]))
