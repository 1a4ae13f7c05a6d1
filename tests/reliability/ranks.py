"""The training runs of one rank, which test_ranks.py starts in several processes and compares.

`python -m tests.reliability.ranks [WORLD...] [--trial]` runs them with each number of ranks (2 and 4 by default) and
records how many tensors differ.
"""

import contextlib
import datetime
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vqssl
from examples.pretrain.ranks import buffers_stay
from tests.rank_processes import run_ranks
from tests.reliability.material import Net, gradients, images
from tests.reliability.record import write
from tests.test_distributed import BATCHES, make_codebook
from vqssl.distributed import rank_counts, slots

TIMEOUT = datetime.timedelta(seconds=120)
PER_RANK = 4
PARITY_STEPS = 30


def everything(module):
    """Return all parameters and buffers, gathered where a module is sharded."""
    named = [(name, t) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor)]
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in named}


def train(net, forward, optimizer, steps, rank, count=PER_RANK):
    """Train as a user of DDP would, and return the loss of each step."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = forward(images(step, count(step) if callable(count) else count, rank).to(next(net.parameters()).dtype))
        loss.backward()
        optimizer.step()
        net.teacher.update_(net.student)
        losses.append(loss.detach())
    return torch.stack(losses)


def sgd(net):
    """Return the optimiser of all runs."""
    return torch.optim.SGD(net.trained(), lr=0.05, momentum=0.9)


def ddp(net):
    """Wrap a network; forward passes broadcast no buffers, which have to stay equal without that."""
    return DistributedDataParallel(net, **buffers_stay())


@contextlib.contextmanager
def counted():
    """Collect the size in bytes of every all-reduce within the block."""
    seen, original = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        seen.append(tensor.numel() * tensor.element_size())
        return original(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        yield seen
    finally:
        dist.all_reduce = original


def work(rank, world, folder, steps):
    """Run all cases on one rank, and save their results to `folder`."""
    torch.set_num_threads(1)
    early = make_codebook("k-means", "float32")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=TIMEOUT)
    found = {"steps": steps}

    # DDP with BatchNorm, k-means and revival; batch sizes differ between ranks and steps.
    net = Net(initialization=vqssl.KMeansInit(5))
    found["ddp losses"] = train(
        net, ddp(net), sgd(net), steps, rank, lambda step: [4, 3 + rank, 2 + 3 * (rank == 0)][step % 3]
    )
    found["ddp"] = everything(net)
    # On the same images on all ranks: the teacher's embedding, codes and commitment loss.
    z_c, maps = net.eval().teacher(images(99, 6)[0])
    out = net.quantizer(maps)
    found["ddp common"] = {
        "z_c": z_c,
        "loss": out.commitment_loss,
        "codes": torch.cat([q.flatten() for q in out.quantized]),
    }

    # To be compared, values and gradients, with one process on the joined batch.
    for kind in ("euclidean", "cosine"):
        net = Net("group", initialization=vqssl.KMeansInit(5), metric=kind).double()
        seen = []
        optimizer, forward = sgd(net), ddp(net)
        for step in range(PARITY_STEPS):
            optimizer.zero_grad()
            loss = forward(images(step, PER_RANK, rank).double())
            loss.backward()
            seen.append((loss.detach(), gradients(net)))
            optimizer.step()
            net.teacher.update_(net.student)
        found["parity", kind] = seen, everything(net)

    # FSDP2 on blocks and root: the student sharded with the teacher whole or sharded; the teacher alone; neither.
    for teacher in ("whole", "sharded", "alone", "neither"):
        net = Net("group", initialization=vqssl.KMeansInit(5))
        sharded = [net.student] if teacher in ("whole", "sharded") else []
        sharded += [net.teacher.module] if teacher in ("sharded", "alone") else []
        for student in sharded:
            for part in (*student.stages, student):
                fully_shard(part)
        for part in (net.predictor, net.fusion):
            fully_shard(part)
        # Gradients of a student that is not sharded are not averaged, so all ranks get the same images.
        shown = rank if net.student in sharded else 0
        found["fsdp", teacher, "losses"] = train(net, net, sgd(net), PARITY_STEPS, shown)
        found["fsdp", teacher] = everything(net)
    # With BatchNorm, whose buffers are never sharded, and a forward pass of the student before the teacher's update.
    net = Net("batch")
    for student in (net.student, net.teacher.module):
        for part in (*student.stages, student):
            fully_shard(part)
    before = everything(net.teacher)
    optimizer = sgd(net)
    for step in range(3):
        net(images(step, 4, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        net.student(images(step, 4, rank)[0])
        net.teacher.update_(net.student)
    after = everything(net.teacher)
    found["fsdp moved"] = {name: (after[name] - before[name]).abs().max() for name in after if "weight" in name}
    found["fsdp batch"] = after
    try:
        vqssl.MomentumTeacher(net.student)
    except ValueError as error:
        found["sharded first"] = str(error)
    net = Net("group", initialization=vqssl.KMeansInit(5))
    found["fsdp", "as ddp", "losses"] = train(net, ddp(net), sgd(net), PARITY_STEPS, rank)
    found["fsdp", "as ddp"] = everything(net)

    # A codebook alone, on all kinds of batches in turn: uneven, empty, masked, not finite.
    kinds = list(BATCHES.values())
    codebook = make_codebook("k-means", "float64")
    for step in range(steps):
        codebook(*kinds[step // 5 % len(kinds)](rank, step, torch.float64))
    found["codebook"] = everything(codebook)
    for step in range(20):
        early(*kinds[0](rank, step, torch.float32))
    found["early"] = everything(early)

    # Half-precision statistics whose sum overflows, and a process group without this rank.
    big = torch.nn.BatchNorm1d(2).half()
    big.running_var.fill_(40000.0)
    teacher = vqssl.MomentumTeacher(big)
    teacher.update_(big)
    found["big"] = teacher.module.running_var
    foreign = [dist.new_group([other]) for other in range(world)][(rank + 1) % world]
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    teacher = vqssl.MomentumTeacher(linear, momentum=0.0, process_group=foreign)
    kept = everything(teacher)
    torch.nn.init.ones_(linear[0].weight)
    try:
        teacher.update_(linear, step=7)
    except ValueError as error:
        found["foreign"] = str(error)
    found["foreign changed"] = differing(kept, everything(teacher)), teacher.step

    # Bytes sent with revival and without, after the first step, which initialises.
    for revival in (vqssl.BatchRevival(), None):
        quantizer = vqssl.MultiScaleQuantizer([8, 12, 16], codebook_size=32, dim=8, revival=revival)
        maps = [torch.randn(2, c, 4, 4) for c in (8, 12, 16)]
        quantizer(maps)
        with counted() as seen:
            quantizer(maps)
        found["travels", revival is not None] = seen
    # Token counts beyond float32's precision arrive exactly.
    many = torch.tensor(2**40 + 12345 + rank)
    summed = slots(many, torch.float32)
    dist.all_reduce(summed)
    found["counts"] = rank_counts(summed)

    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(world, folder, steps):
    """Start the ranks, and return the results of each."""
    run_ranks(work, (world, str(folder), steps), world, seconds=500)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def single(world, kind):
    """Train in one process on the joined batches of all ranks."""
    net = Net("group", initialization=vqssl.KMeansInit(5), metric=kind).double()
    optimizer, seen = sgd(net), []
    for step in range(PARITY_STEPS):
        optimizer.zero_grad()
        views = torch.stack([images(step, PER_RANK, rank).double() for rank in range(world)])
        loss = net(views)
        loss.backward()
        seen.append((loss.detach(), gradients(net)))
        optimizer.step()
        net.teacher.update_(net.student)
    return seen, everything(net)


def differing(a, b):
    """Return the names of tensors that are not equal to the bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative(found, expected):
    """Return the largest difference, relative to the largest expected entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def summary(world, found, steps):
    """Return as figures what test_ranks.py asserts."""

    def off(case):
        return sorted({name for other in found[1:] for name in differing(found[0][case], other[case])})

    own = [name for name in off("ddp") if "running_" in name and not name.startswith("teacher.")]
    figures = {
        "ranks": world,
        "steps": steps,
        "tensors compared between ranks": sum(len(found[0][case]) for case in CASES),
        "of them that differ": sum(len(off(case)) for case in CASES) - len(own),
        "BatchNorm statistics of the student's own that differ": len(own),
    }
    for kind in ("euclidean", "cosine"):
        expected_steps, expected = single(world, kind)
        losses, slopes = [], []
        for step, (loss, slope) in enumerate(expected_steps):
            ours = [rank["parity", kind][0][step] for rank in found]
            losses.append(relative(torch.stack([loss for loss, _ in ours]).mean(), loss))
            slopes += [relative(ours[0][1][name], g) for name, g in slope.items() if g.abs().max() > 1e-12]
        state = [relative(t.double(), expected[name].double()) for name, t in found[0]["parity", kind][1].items()]
        figures[f"{kind}: off from one process"] = {
            "loss": f"{max(losses):.0e}", "gradient": f"{max(slopes):.0e}", "state": f"{max(state):.0e}"
        }  # fmt: skip
    return figures


CASES = ("ddp", "codebook", ("fsdp", "whole"), ("fsdp", "sharded"))

if __name__ == "__main__":
    worlds = [int(world) for world in sys.argv[1:] if world.isdigit()] or [2, 4]
    table = []
    for size in worlds:
        with tempfile.TemporaryDirectory() as place:
            table.append(summary(size, run(size, place, 200), 200))
    write("ranks", "python -m tests.reliability.ranks", {"runs": table}, trial="--trial" in sys.argv)
