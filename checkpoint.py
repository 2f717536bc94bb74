r"""The machinery of a run: errors, whole files, backbones and adapters on disk, an exact resume, several GPUs. The
method can be read without it.

A run may end at any moment: a power cut, a full disk, Ctrl-C. So a file is written under another name and then moved
into place: a reader finds the old file or the new one, never half of one. A checkpoint is one such file with all that
the next step depends on: the tensors that learn, the optimizer's state and the log so far.

With several GPUs (torchrun --nproc-per-node N -- train.py ...) every process holds the whole model and reads its share
of a step's rows; one exchange a step adds up the gradients. (DistributedDataParallel expects all processes to use the
same parameters; here one may have no row of a task, and a task that none has must keep a gradient of None.)
"""

import argparse
import atexit
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers.utils import cached_file


class UserError(ValueError):
    """Something the user can fix: the message names the value, the limit and the remedy. Nothing was written."""

    code = 2


class RunFailed(UserError):
    """Work that had begun cannot continue; what was saved is kept."""

    code = 1


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence complaints."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help lists every option")


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program's main and return its exit code; errors become one line on stderr, with --debug a traceback."""
    warnings.filterwarnings("ignore", ".*past_key_values", FutureWarning)  # its new name is unknown to older versions
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main([word for word in argv if word != "--debug"])
        return 0
    except (UserError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        if "--debug" in argv:
            raise
        code, sentence = getattr(error, "code", 1), " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            code, sentence = 130, "stopped"
        elif isinstance(error, torch.OutOfMemoryError):
            sentence = ("the GPU's memory is full; add --checkpointing, lower --tokens-per-batch (training), "
                        "--eval-tokens (test rows) or --tokens (benchmark), or free the GPU")
        resume = "" if isinstance(error, UserError) else "; what was saved is kept: repeat the command to resume"
        print(f"error: {sentence}{resume}", file=sys.stderr)
        return code


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
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with write_whole(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def read_json(path: Path):
    """What write_json wrote. Raises UserError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); give a folder that train.py made") from error


FAMILIES = ("qwen2", "qwen3", "llama", "mistral")  # they have k_proj, v_proj and transformers' attention interface


def check_backbone(backbone: transformers.PreTrainedModel) -> None:
    """Raise UserError for a model that no prompt can be put into."""
    family = getattr(backbone.config, "model_type", "?")
    if family not in FAMILIES or backbone.get_output_embeddings() is None:
        raise UserError(f"the backbone is a {type(backbone).__name__} (model type '{family}'), but this needs a "
                        f"causal language model of one of the families {', '.join(FAMILIES)}")
    rope = (getattr(backbone.config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise UserError(f"the positions of this backbone ('{rope}' RoPE) depend on the longest row of a batch, and "
                        "so would answers on their neighbours; take a backbone with another kind, such as YaRN")


def load_tokenizer(path: str | Path) -> transformers.PreTrainedTokenizerFast:
    try:  # tokenizer.json as it is: a declared class may read it in another way, and an inferred one always does
        return transformers.PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError):  # only a SentencePiece model or the like
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_backbone(path: str | Path = "", dtype: str = "float32", device: torch.device | str = "cpu") -> tuple[
        transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """The backbone ``path`` (a folder, a hub name, or "" for the micro-world's own) and its tokenizer. dtype:
    "float32" or "bfloat16". Only data is read (safetensors, never code), into host memory first. UserError for
    what is not a causal language model of one of FAMILIES with all its weights and a tokenizer that belongs to it."""
    name, path = str(path), path or Path(__file__).parent / "tasks" / "micro_backbone"
    try:
        config = transformers.AutoConfig.from_pretrained(path, attn_implementation="sdpa", trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
        if quantised:
            raise ValueError(f"its weights are quantised ({dict(quantised).get('quant_method')}); give plain ones")
        tokenizer = load_tokenizer(path)
        backbone, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
        check_backbone(backbone)
        for file in Path(cached_file(path, "config.json")).parent.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
            if kinds - {"F64", "F32", "F16", "BF16"}:
                raise ValueError(f"its weights are stored as {', '.join(sorted(kinds))}; give plain ones, in bf16 say")
        broken = [name for name, p in backbone.named_parameters() if not p.detach().sum().isfinite()]
        unread = [name for name in loaded["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
        for fault, names in (("missing", loaded["missing_keys"]), ("not finite", broken), ("not read by it", unread)):
            if names:
                raise ValueError(f"{len(names)} of its tensors are {fault}: {', '.join(sorted(names)[:3])}")
        most, count = backbone.config.vocab_size, len(tokenizer)
        if not tokenizer("a").input_ids or tokenizer.eos_token_id is None or count > most:
            raise ValueError("its tokenizer needs a vocabulary (tokenizer.json), an end token (it has "
                             f"{tokenizer.eos_token}) and at most the model's {most:,} tokens (it has {count:,})")
    except Exception as error:  # whatever a folder makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"'{path}' cannot be used as a backbone ({reason}); --backbone takes the folder of a causal "
                        "language model (config.json, safetensors, tokenizer) or its name on the hub") from error
    backbone.name_or_path = name
    return backbone.to(device), tokenizer


# What a model computes depends on these entries of its config, in every version of transformers, and on its weights.
COMPUTES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window", "rope_parameters")


def describe(backbone: transformers.PreTrainedModel) -> dict:
    """What identifies a backbone, by content and not by name: its sizes, and a hash of its config and of the first 64
    weights of every tensor, in bf16, so that the same weights loaded in fp32 and in bf16 are the same backbone."""
    shape = backbone.config.to_dict()
    digest = hashlib.sha256(json.dumps({name: shape.get(name) for name in COMPUTES}, sort_keys=True).encode())
    if backbone.device.type != "meta":
        some = [p.detach().flatten()[:64].to(torch.bfloat16) for _, p in sorted(backbone.named_parameters())]
        digest.update(torch.cat(some).cpu().view(torch.uint8).numpy().tobytes())
    return {name: shape.get(name) for name in COMPUTES[:6]} | {"hash": digest.hexdigest()[:16]}


def write_adapter(folder: Path, kind: str, model, tensors: dict[str, torch.Tensor], **about) -> None:
    """kind.safetensors and kind.json in ``folder``; the backbone by the name its user gave, and as `describe` does."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / f"{kind}.safetensors") as file:
        file.write(save({name: t.cpu().contiguous() for name, t in tensors.items()}))
    backbone = model.backbone
    named = {"name": backbone.name_or_path, "revision": getattr(backbone.config, "_commit_hash", None),
             "dtype": str(backbone.dtype).removeprefix("torch.")}
    write_json(folder / f"{kind}.json", {"method": model.method, "backbone": named | model.described, **about})


def read_adapter(folder: Path, kind: str, method: str, backbone: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `write_adapter` wrote: the JSON and the tensors; UserError if they cannot be used with this backbone."""
    try:
        saved = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        if saved["method"] != method:
            raise ValueError(f"it is of method '{saved['method']}', not '{method}'")
        named = saved["backbone"]
        wrong = [f"{key} = {named[key]} (this one has {value})"
                 for key, value in backbone.items() if named.get(key, value) != value]
        if wrong:
            raise ValueError(f"it was trained on a backbone with {', '.join(wrong)}")
        return saved, load_file(folder / f"{kind}.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the {kind} in '{folder}' cannot be used ({error}); give a folder with {kind}.json and "
                        f"{kind}.safetensors as a training run wrote them, and its backbone") from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let only one process write to a run's folder. The system frees the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise UserError(f"another process is working in '{folder}'; wait for it, or choose another --run") from error


def open_log(folder: Path) -> Callable[[str], None]:
    """A function that prints a line and appends it, with the time of day, to log.txt."""
    logger = logging.getLogger("ta-lora")
    logger.propagate, logger.level = False, logging.INFO
    logger.handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "log.txt", "a", "utf-8")]
    logger.handlers[1].setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    return logger.info


def environment(command: str) -> dict:
    """What it takes to repeat a result: command, commit, versions, machine."""
    return {"command": command, "python": platform.python_version(), "torch": torch.__version__,
            "commit": subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty 2>/dev/null"),
            "transformers": transformers.__version__, "machine": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "threads": torch.get_num_threads(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}


def same_run(folder: Path, made_of: dict) -> None:
    """Refuse to resume or build on a stage that was made of something else; ``made_of`` is (a part of) stage.json."""
    if not (folder / "stage.json").exists():
        if (folder / "results.json").exists():
            raise UserError(f"'{folder}' was written by an earlier release; choose another --run, or delete it")
        return
    before = read_json(folder / "stage.json")
    other = [f"{name} {before.get(name)} (now {now})" for name, now in made_of.items()
             if before.get(name, now) != now]
    if other:
        raise UserError(f"'{folder}' was trained with {', '.join(other)}; choose another --run, or delete that folder")


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer,
                    progress: dict) -> None:
    """Write checkpoint.pt and, from progress["history"], metrics.jsonl."""
    buffer = io.BytesIO()  # torch.save would hide a full disk behind an error of its own
    torch.save({"tensors": tensors, "optimizer": optimizer.state_dict(), "progress": progress}, buffer)
    with write_whole(folder / "metrics.jsonl") as file:  # first: after the last checkpoint no step would write it again
        file.writelines((json.dumps(row) + "\n").encode() for row in progress["history"])
    with write_whole(folder / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict | None:
    """Put the checkpoint's state into ``tensors`` and ``optimizer`` and return its progress; None if there is none."""
    path = folder / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
        optimizer.load_state_dict(saved["optimizer"])
        for name, tensor in tensors.items():
            tensor.copy_(saved["tensors"][name])
        return saved["progress"]
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a broken file makes torch raise
        raise UserError(f"the checkpoint '{path}' cannot be read ({type(error).__name__}: {error}); delete it to "
                        "restart this stage") from error


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is finished and saved first; a second one stops at once."""
    caught = []

    def remember(number: int, frame) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def pick_device(device: str) -> str:
    """A device by its name; of several processes on GPUs each has one of its own."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = found if device == "auto" else device
    return f"cuda:{os.environ['LOCAL_RANK']}" if PROCESSES > 1 and device.startswith("cuda") else device


def pick_dtype(dtype: str, device: str) -> str:
    """For "auto" bfloat16 on a GPU, on a CPU what multiplies matrices faster: some have instructions for bfloat16."""
    if dtype != "auto" or device != "cpu":
        return "bfloat16" if dtype == "auto" else dtype
    seconds = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.ones(1024, 1024, dtype=getattr(torch, name))
        matrix @ matrix  # the first product also sets up threads and kernels
        started = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        seconds[name] = time.perf_counter() - started
    faster = sum_over_processes(seconds["bfloat16"] < seconds["float32"]) > PROCESSES / 2  # all processes take the same
    print("--dtype auto: 5 products of large matrices take", *(f"{1000 * s:.0f} ms in {n}" for n, s in seconds.items()))
    return "bfloat16" if faster else "float32"


def join_processes(device: str, folder: str) -> tuple[str, str]:
    """Join the others that torchrun started; -> device and folder of this process. All but the first are silent and
    work on a copy of the run's folder, which is deleted at the end."""
    if PROCESSES == 1:
        return device, folder
    device = device if device.startswith("cuda") else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout, own = open(os.devnull, "w"), tempfile.mkdtemp()
        atexit.register(shutil.rmtree, own)
        if os.path.isdir(folder):
            shutil.copytree(folder, own, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        folder = own
    dist.barrier()
    return device, folder


def sum_over_processes(number: int) -> int:
    """The sum over all processes."""
    numbers = [number] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(numbers, number)
    return sum(numbers)


def sum_gradients(learning: list[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Replace loss and gradients by their sums over all processes; a gradient that no process has stays None."""
    if PROCESSES == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    has = loss.new_tensor([p.grad is not None for p in learning])
    dist.all_reduce(summed := torch.cat([loss.reshape(1), has, *(g.flatten() for g in grads)]))
    loss_, users, *grads = summed.split([1, len(has), *(p.numel() for p in learning)])
    loss.copy_(loss_[0])
    for p, used, grad in zip(learning, users.tolist(), grads):
        p.grad = grad.view_as(p) if used else None
