r"""Several processes, one training run.

    torchrun --nproc-per-node N -- train.py --preset qwen2.5-7b --stage all      (-- or it takes --run for its own)

Every process holds the whole frozen backbone and the whole adapter, and all of them draw the same step from the same
sampler. Of each micro-batch process n reads rows n, n + N, n + 2N .... The loss of Eq. (3) is a mean over the rows of
the step, so with R rows in all processes together

    gradient = sum over processes of  d / d adapter  (1 / R) sum over its own rows of their losses

is what one process would have computed, whichever tasks a process happens to hold. One all-reduce a step carries this
sum: the numbers that learn, 4 bytes each, nothing of the backbone. Test rows are shared out the same way. Process 0
alone writes files.

torch's DistributedDataParallel does such sums in hooks of the backward pass. It expects of every process a forward pass
that meets the same parameters. Here a process may have no row of some task, or no row at all, and a task that *no*
process has must keep a gradient of None, so that AdamW leaves it alone. So the sum is written out.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError

RANK, PROCESSES = 0, 1  # which process this is, and of how many
DEVICE = "cpu"  # where numbers that are exchanged lie


def told(name: str) -> int:
    """What torchrun tells a process of itself by an environment variable; without torchrun that of a process alone."""
    alone = int(name.endswith("WORLD_SIZE"))
    value = os.environ.get(name, str(alone))
    if name != "WORLD_SIZE" and told("WORLD_SIZE") < 2:
        return alone
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"the environment variable {name} is '{value}', but must be a whole number; start several "
                        "processes with torchrun, which sets it, and for one process unset WORLD_SIZE")
    return int(value)


def place(device: str) -> str:
    """The device of this process: "auto" is a GPU if there is one; of several processes each has a GPU of its own."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    several = told("WORLD_SIZE") > 1
    return f"cuda:{told('LOCAL_RANK')}" if device.startswith("cuda") and several else device


def start(device: str) -> None:
    """Join the other processes that torchrun started, if any; the first one alone goes on printing.

    Raises UserError for an environment that torchrun has not made.
    """
    global RANK, PROCESSES, DEVICE
    processes = told("WORLD_SIZE")
    if processes < 2:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or told("RANK") >= processes:
        wrong = f"RANK is {os.environ['RANK']}" if not missing else f"{missing[0]} is not set"
        raise UserError(f"the environment variable WORLD_SIZE is {processes}, but {wrong}; start several processes "
                        "with torchrun, which sets both, and for one process unset WORLD_SIZE")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    RANK, PROCESSES, DEVICE = dist.get_rank(), dist.get_world_size(), device
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def share(rows: list) -> list:
    """This process's part of some rows."""
    return rows[RANK::PROCESSES]


def together(own: list) -> list:
    """All rows in their order again, from what every process made of its share."""
    if PROCESSES == 1:
        return own
    parts = [None] * PROCESSES
    dist.all_gather_object(parts, own)
    rows = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        rows[rank::PROCESSES] = part
    return rows


def total(count: int) -> int:
    """The sum of a whole number over all processes."""
    return count if PROCESSES == 1 else _reduced(count, dist.ReduceOp.SUM)


def largest(count: int) -> int:
    """The largest of every process's whole number."""
    return count if PROCESSES == 1 else _reduced(count, dist.ReduceOp.MAX)


def _reduced(count: int, how) -> int:
    number = torch.tensor(count, device=DEVICE)
    dist.all_reduce(number, how)
    return int(number)


def sum_gradients(parameters: list[Tensor], loss: Tensor) -> None:
    """Replace loss and gradients by their sums over all processes, in one exchange.

    A parameter that has no gradient in any process keeps None.
    """
    if PROCESSES == 1:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=loss.dtype, device=loss.device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    everything = torch.cat([loss.reshape(1), has, *(g.flatten() for g in grads)])
    dist.all_reduce(everything)
    loss_, users, *summed = everything.split([1, len(has), *(p.numel() for p in parameters)])
    loss.copy_(loss_[0])
    for p, used, grad in zip(parameters, users.tolist(), summed):
        p.grad = grad.view_as(p) if used else None


def same(tensors: list[Tensor]) -> None:
    """Give all processes the values of process 0."""
    if PROCESSES > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wait() -> None:
    """Until every process has come this far: what process 0 wrote before is there for all."""
    if PROCESSES > 1:
        dist.barrier()
