r"""What survives an interruption: files that are whole or not there, and checkpoints to go on from exactly.

A run ends in a power cut, a full disk or a Ctrl-C, at any moment, while a file is being written too. So a file is
written beside its place, forced onto the disk and then moved there, which a file system does in one step: a reader
finds the old file or the new one, never half of one. And one process at a time writes into a folder.

A checkpoint is one such file. It holds everything the next step depends on: the tensors that learn, the optimizer's
state, the place in the data, the random state, the best score so far, and how long metrics.jsonl was. Lines that were
logged after it are cut off when training goes on, and written again by the same steps: on the CPU, N steps, a kill and
N more steps leave the same files as 2 N steps, bit for bit, but for times.
"""

import copy
import errno
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

import parallel
from errors import Stopped, UserError

try:
    import fcntl
except ImportError:  # Windows: nothing guards a folder there
    fcntl = None


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` once it is complete; after an error ``path`` is as it was.

    Raises OSError with the file's name if it cannot be written (disk full, no permission). Of several processes of a
    run only the first one writes.
    """
    if parallel.RANK:
        yield io.BytesIO()
        return
    beside = path.with_name(f".{path.name}.part")  # one name, so that what a kill leaves is written over
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save hides a full disk behind an error of its own
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise error


def write_json(path: Path, value) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def like(value, model) -> bool:
    """Whether a value has the form of another: types, a dictionary's names, a list's length (of an empty one any), and
    no negative number for one from 0 up."""
    if type(value) is not type(model):
        return False
    if isinstance(model, dict):
        return all(name in value and like(value[name], own) for name, own in model.items())
    if isinstance(model, list):
        return not model or len(value) == len(model) and all(map(like, value, model))
    return not isinstance(model, (int, float)) or model < 0 or 0 <= value < math.inf


def read_json(path: Path, remedy: str, **form):
    """What write_json wrote; UserError with the remedy if it cannot be read, or lacks something that is like `form`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if form and not like(value, form):
            raise ValueError(f"{' and '.join(form)} should be in it, in the form they are written in")
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"'{path}' cannot be read ({reason}); {remedy}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from in here names the file, which write and flush do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Lock:
    """One process at a time works in a folder: within this context, from the start if the folder is there, otherwise
    from `take`, which makes it. UserError if another one has it.

    The system frees the lock of a process that is gone, however it went; the file `.lock` means nothing by itself. Of
    the processes of one torchrun job the first takes it for all.
    """

    def __init__(self, folder: Path):
        self.folder, self.file, self.new = folder, None, not folder.exists()

    def __enter__(self):
        if not self.new:
            self.take()
        return self

    def take(self) -> None:
        if self.file or fcntl is None or parallel.told("RANK"):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=not self.new)  # made by another one meanwhile: FileExistsError
            self.file = open(self.folder / ".lock", "a")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError) as error:
            raise UserError(f"another process is at work in '{self.folder}'; wait for its end, or choose another folder"
                            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
                raise

    def __exit__(self, *_):
        if self.file:
            self.file.close()


# ------------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, sampler,
                    progress: dict, identity: dict) -> None:
    """progress: numbers of the loop (step, best score ...); identity: what a continuation must have in common."""
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    with atomic(path) as file:
        torch.save({"tensors": tensors, "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict(),
                    "random": random, "progress": progress, "identity": identity}, file)


def misfit(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """Why tensors from a file cannot take the place of our own, by name; "" if they can."""
    kinds, others = ({name: f"{tuple(t.shape)} {t.dtype}" if isinstance(t, torch.Tensor) else f"a {type(t).__name__}"
                      for name, t in tensors.items()} for tensors in (own, found))
    if kinds != others:
        name = sorted(set(kinds.items()) ^ set(others.items()))[0][0]
        return f"tensor '{name}' should be {kinds.get(name, 'absent')} and is {others.get(name, 'absent')}"
    bad = [name for name, t in found.items() if not t.isfinite().all()]
    return f"it holds numbers that are not finite, in {', '.join(bad)}" if bad else ""


# What an optimizer keeps of a tensor that has moved: a number (True), or something of the tensor's shape.
MOMENTS = {"AdamW": {"step": True, "exp_avg": False, "exp_avg_sq": False}, "Muon": {"momentum_buffer": False}}


def load_optimizer(optimizer: torch.optim.Optimizer, moments: dict) -> None:
    """Take over what was kept of every tensor; rates are the options'. Raises for what does not fit."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for number, found in moments.items():
        fits = {name: () if single else tensors[number].shape
                for name, single in MOMENTS[type(optimizer).__name__].items()}
        if {name: t.shape for name, t in found.items()} != fits or not all(t.isfinite().all() for t in found.values()):
            raise ValueError(f"the optimizer's numbers for tensor {number} do not fit it, or are not finite")
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def load_checkpoint(path: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, sampler,
                    progress: dict, identity: dict) -> dict:
    """Put a checkpoint's state into the tensors, the optimizer, the sampler and the random generators -> its progress.

    progress: what it is before the first step, which shows its form. Raises ValueError, before a tensor is changed, if
    the file cannot be read, is not whole or belongs to something else.
    """
    def unreadable(error: Exception) -> ValueError:  # whatever a broken file makes torch and others raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ValueError(f"the checkpoint '{path}' cannot be read ({reason}); delete it to begin this stage anew")

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain numbers, never code
        before, state = dict(saved["identity"]), dict(saved["tensors"])
        wrong = misfit(tensors, state)
    except Exception as error:
        raise unreadable(error) from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise ValueError(f"the checkpoint '{path}' belongs to another {name} ({before.get(name)}, now {value}); go "
                             "on with that one, or choose another --run")
    if wrong:
        raise ValueError(f"the checkpoint '{path}' does not fit this stage: {wrong}; another --run, or delete it "
                         "to begin this stage anew")
    try:
        for name, own in (("progress", progress), ("sampler", sampler.state_dict())):
            if not like(saved[name], own):
                raise ValueError(f"its {name} is not what it should be: {str(saved[name])[:80]}")
        trial = copy.copy(sampler)
        trial.load_state_dict(saved["sampler"])
        trial.next()  # a place that is not in the data shows now
        sampler.load_state_dict(saved["sampler"])
        pair = optimizer, saved["optimizer"]
        for one, its in zip(*pair, strict=True) if isinstance(optimizer, list) else [pair]:
            load_optimizer(one, its["state"])
        torch.set_rng_state(saved["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"])
    except Exception as error:
        raise unreadable(error) from error
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
    return saved["progress"]


# -------------------------------------------------------------------------------------------------------- signals

class Signals:
    """Within this context SIGINT and SIGTERM raise Stopped, but not in the middle of what `finishing` encloses.

    A second signal does not wait.
    """

    def __init__(self):
        self.caught, self.busy = 0, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        if not self.busy or self.caught:
            raise Stopped(number)
        self.caught = number

    @contextmanager
    def finishing(self, save: Callable[[], None]):
        """A step is finished, and saved, before a signal is obeyed."""
        self.busy = True
        try:
            yield
            stop = parallel.largest(self.caught)  # all processes stop after the same step, or none
            if stop:
                save()
        finally:
            self.busy = False
        if stop or (self.caught and parallel.PROCESSES == 1):
            raise Stopped(stop or self.caught)
