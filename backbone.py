r"""Where a backbone comes from: a folder, the hub, or the micro-world's own, and what makes one unusable."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import toy
from errors import UserError
from frozen import FrozenLM, TALoRAConfig


def load_backbone(name: str, dtype: str, device: torch.device | str):
    """The backbone ``name`` (a folder, a hub name, or "" for the micro-world's own) and its tokenizer.

    dtype: "float32" or "bfloat16". Only data is read: weights as safetensors, no pickle, no code that a folder brings.
    Raises UserError for what is no causal language model of a supported family, for weights that are missing or not
    finite, and for a tokenizer that does not belong to it.
    """
    if not name:
        try:
            backbone, tokenizer = toy.load_backbone()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        return backbone.to(device, getattr(torch, dtype)), tokenizer
    try:
        tokenizer = load_tokenizer(name)
        # device_map: each weight goes to the device as it is read; 7B never lies in host memory as a whole.
        backbone, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), device_map={"": torch.device(device)}, output_loading_info=True,
            use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True)
        broken = [name for name, p in backbone.named_parameters() if not p.detach().sum().isfinite()]
        for fault, names in (("have another shape than its config says in", [n for n, *_ in loaded["mismatched_keys"]]),
                             ("lack", loaded["missing_keys"]), ("are not finite in", broken)):
            if names:
                raise ValueError(f"its weights {fault} {', '.join(sorted(names)[:3])}")
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, too, but no fault of the backbone
    except Exception as error:  # whatever a folder makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"'{name}' is no causal language model that can be loaded ({reason}); --backbone takes a "
                        "folder with config.json, weights (safetensors) and tokenizer, or the hub's name of one"
                        ) from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{name}' has no pad or no end token; any token can pad, since "
                        "padding is masked by position: set tokenizer.pad_token = tokenizer.eos_token and save it")
    if len(tokenizer) > backbone.config.vocab_size:
        raise UserError(f"the tokenizer of '{name}' has {len(tokenizer):,} tokens but its model only "
                        f"{backbone.config.vocab_size:,}; they do not belong together")
    try:
        FrozenLM(backbone, TALoRAConfig())
    except ValueError as error:
        raise UserError(str(error)) from error
    return backbone, tokenizer


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub name, as the class its own tokenizer_config.json declares.

    AutoTokenizer goes by the model's type instead, and takes the tokenizer of a Qwen2 made from scratch (words or
    characters) for Qwen's byte-level one.
    """
    about = Path(name) / "tokenizer_config.json"
    declared = json.loads(about.read_text(encoding="utf-8")).get("tokenizer_class") if about.exists() else None
    plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")  # the name before and since transformers 5
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(name, trust_remote_code=False)
