r"""What a user is told when something goes wrong: one sentence, and where the fault lies by the exit code.

    2     the command, the data or the backbone cannot be used as they are (UserError); nothing was written
    1     the work failed on its way (RunFailed, a full disk ...); what was finished is kept
    130   Ctrl-C, 143 SIGTERM: stopped on demand, to be gone on with

`--debug` shows the traceback instead.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable

import torch


class UserError(ValueError):
    """Something the user can mend; the message names the value, the limit and the remedy."""


class RunFailed(UserError):
    """Work that was begun cannot be finished."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Like KeyboardInterrupt it is no Exception: nothing is to catch it by accident."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one sentence, too."""

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            if re.search("[\ud800-\udfff]", word):  # what Python makes of bytes that it cannot decode
                raise UserError(f"{word!r} is no text in this terminal's encoding ({sys.getfilesystemencoding()}); "
                                "type it anew, or set PYTHONUTF8=1")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message}; python {self.prog} --help lists every option")


def program(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program's main; -> its exit code. Errors become one line on stderr, with --debug a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # a terminal that has no letter for it shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        main([option for option in argv if option != "--debug"])
        sys.stdout.flush()  # a full disk is to be noticed here, not when Python ends
        return 0
    except (UserError, Stopped, KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        if "--debug" in argv:
            raise
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            silence()
            return 0
        if isinstance(error, UserError):
            code, sentence = 1 if isinstance(error, RunFailed) else 2, f"error: {error}"
        elif isinstance(error, OSError):
            where = error.filename or ("a file" if silence() else "standard output")
            code, sentence = 1, (f"error: {where}: {error.strerror or error}; what was saved before is as it was: mend "
                                 "that and repeat the command to go on")
        elif isinstance(error, torch.OutOfMemoryError):
            peak = torch.cuda.max_memory_allocated() / 1e9
            code, sentence = 1, (f"error: the GPU's memory is full (at the peak {peak:.1f} GB); for training add "
                                 "--checkpointing on or lower --tokens-per-batch, for answering test rows lower "
                                 "EVAL_TOKENS in evaluate.py or --max-length, and see that no other program is on this "
                                 "GPU; what was saved is as it was: repeat the command to go on")
        else:
            code = getattr(error, "code", 130)
            sentence = "stopped; nothing that was saved is lost: repeat the command to go on"
        rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        another = rank.isdecimal() and processes.isdecimal() and 0 < int(rank) < int(processes)
        if not another or code == 1:  # what is wrong with a command all processes would say
            short = re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}...{word[0][-50:]}", " ".join(sentence.split()))
            print(short, file=sys.stderr)
        return code


def silence() -> bool:
    """Whether standard output takes what is left for it; if not (full, or nobody reads), it is thrown away."""
    try:
        sys.stdout.flush()
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
