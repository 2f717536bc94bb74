r"""What a run survives: files that are whole or absent, one process per folder, and an exact resume.

A run may end at any moment: a power cut, a full disk, Ctrl-C. So a file is written under another name and then moved
into place, which a file system does in one step: a reader finds the old file or the new one, never half of one.

A checkpoint is one such file with everything the next step depends on: the tensors that learn, the optimizer's state
and the log so far. Nothing else is needed, because the batches of a step are a function of its number (data.Batches).
Nobody needs this file to understand the method.
"""

import argparse
import io
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock
import torch
import transformers


class UserError(ValueError):
    """Something the user can fix: the message names the value, the limit and the remedy. Nothing was written."""

    code = 2


class RunFailed(UserError):
    """Work that had begun cannot go on; what was saved is kept."""

    code = 1


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Like KeyboardInterrupt not an Exception, so that nothing catches it by accident."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence complaints."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help lists every option")


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program's main and return its exit code; errors become one line on stderr, with --debug a traceback."""
    try:
        main([word for word in argv if word != "--debug"])
        return 0
    except (UserError, Stopped, KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        if "--debug" in argv:
            raise
        resume = "what was saved is kept: repeat the command to resume"
        code, sentence = getattr(error, "code", 1), f"error: {error}"
        if isinstance(error, (Stopped, KeyboardInterrupt)):
            code, sentence = getattr(error, "code", 130), f"stopped; {resume}"
        elif isinstance(error, OSError):
            sentence += f"; fix this, {resume}"
        elif isinstance(error, torch.OutOfMemoryError):
            sentence = ("error: the GPU's memory is full; add --checkpointing, lower --tokens-per-batch (training) or "
                        f"--eval-tokens (test rows), or free the GPU; {resume}")
        print(" ".join(sentence.split()), file=sys.stderr)
        return code


# ---------------------------------------------------------------------------------------------------------- files

@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` once it is complete; after an error ``path`` is as it was."""
    part = path.with_name(f".{path.name}.part")  # always the same name, so that a killed run's leftover is replaced
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    with write_whole(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def read_json(path: Path):
    """What write_json wrote. Raises UserError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); give a folder that train.py made") from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let only one process write to a run folder. The system frees the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise UserError(f"another process is working in '{folder}'; wait for it, or choose another --run") from error


def open_log(folder: Path) -> Callable[[str], None]:
    """A function that prints a line and appends it to log.txt."""
    logger = logging.getLogger("ta-lora")
    logger.propagate, logger.level = False, logging.INFO
    logger.handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "log.txt", "a", "utf-8")]
    return logger.info


def environment(command: str) -> dict:
    """What it takes to repeat a result: command, commit, versions, machine."""
    commit = ""
    if shutil.which("git"):
        commit, changed = (subprocess.run(["git", *words], cwd=Path(__file__).parent, text=True, capture_output=True
                                          ).stdout.strip() for words in (
            ("describe", "--always"), ("status", "--porcelain", "--untracked-files=no", "*.py")))
        commit += "-dirty" if changed else ""
    return {"command": command, "commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "machine": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "threads": torch.get_num_threads(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}


# ------------------------------------------------------------------------------------------------------ resuming

def same_run(folder: Path, made_of: dict) -> None:
    """Refuse to continue or build on a stage that was trained on something else; ``made_of`` as in its stage.json."""
    if not (folder / "stage.json").exists():
        if (folder / "results.json").exists():
            raise UserError(f"'{folder}' was written by an earlier release; choose another --run, or delete that folder")
        return
    before = read_json(folder / "stage.json")
    other = [f"{name} {before.get(name)} (now {now})" for name, now in made_of.items() if before.get(name) != now]
    if other:
        raise UserError(f"'{folder}' was trained with {', '.join(other)}; choose another --run, or delete that folder")


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer,
                    progress: dict) -> None:
    """Write checkpoint.pt and, from progress["history"], metrics.jsonl. Raises RunFailed rather than keep NaN or inf."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise RunFailed(f"{', '.join(bad[:3])} at step {progress['step']} are no longer finite and were not saved; "
                        f"lower the learning rates; the last good checkpoint is in {folder}")
    buffer = io.BytesIO()
    torch.save({"tensors": tensors, "optimizer": optimizer.state_dict(), "progress": progress}, buffer)
    with write_whole(folder / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())
    with write_whole(folder / "metrics.jsonl") as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in progress["history"])


def load_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict | None:
    """Put the checkpoint's state into ``tensors`` and ``optimizer`` and return its progress; None if there is none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved["tensors"][name])
        return saved["progress"]
    except Exception as error:  # whatever a broken file makes torch raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the checkpoint '{path}' cannot be read ({reason}); delete it to restart this stage") from error


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is finished and saved first; a second one stops at once."""
    caught = []

    def remember(number: int, frame) -> None:
        if caught:
            raise Stopped(number)
        caught.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
