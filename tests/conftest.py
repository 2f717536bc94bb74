"""What the tests share: a smaller micro-world, tiny random backbones of every family, and adapters that hide nothing.

A zero gate hides every bug behind it, and so do a zero bias and a norm of ones: everything here has random values.
"""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import data
from model import TALoRA, TALoRAConfig
from tasks import micro
from tasks.pretrain import new_backbone

torch.set_num_threads(1)  # tiny tensors gain nothing from more threads, and other numbers of them round differently

SHAPE = dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128, attention_dropout=0.0,
             bos_token_id=None, eos_token_id=None, pad_token_id=0)
TASKS = ["first", "second", "third"]


def resize_world(train_rows, test_rows):
    """What a run does is the same with few rows of a task, and much quicker."""
    micro.TRAIN_ROWS, micro.TEST_ROWS = train_rows, test_rows
    micro.rows.cache_clear()
    data.load_splits.cache_clear()


def save_small_backbone(folder):
    """Save a random backbone of one layer that reads the micro-world, and return its folder."""
    tokenizer, folder = micro.tokenizer(), folder / "backbone"
    new_backbone(tokenizer, seed=0, width=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_options(world, run, *more):
    """Options of all stages, with a checkpoint after every step; world: the folder of a backbone."""
    options = ("--stage all --sources toy-amazon toy-sanwen --targets toy-finre toy-drcd --shots 8 --base-steps 4 "
               "--multitask-steps 12 --target-steps 5 --base-batch 4 --multitask-batch 6 --target-batch 3 "
               "--eval-every 3 --log-every 2 --save-every 1 --dev-rows 4 --no-references --no-pictures")
    return [*options.split(), "--backbone", str(world), "--run", str(run), *more]


def small_run(world, run, *more):
    """Options of a run of all stages that takes a third of a second."""
    return small_options(world, run, "--prompt-length", "3", "--rank", "2", *more)


def read_outcome(run):
    """What a run found, by file: the bytes of its adapters, its log, its scores."""
    found = {path: path.read_bytes() for path in run.glob("**/best/*")}
    for path in run.glob("**/metrics.jsonl"):
        found[path] = [json.loads(line) for line in path.read_text().splitlines()]
    for path in run.glob("**/results.json"):
        found[path] = json.loads(path.read_text()).get("scores")
    return {str(path.relative_to(run)): value for path, value in found.items()}


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """60 train and 6 test rows of a task, and the folder of a random backbone of one layer that reads them."""
    whole = micro.TRAIN_ROWS, micro.TEST_ROWS
    resize_world(60, 6)
    yield save_small_backbone(tmp_path_factory.mktemp("world"))
    resize_world(*whole)


@pytest.fixture
def tiny_backbone():
    """tiny_backbone(family, seed=0, **shape) -> a causal language model with random weights, biases and norms."""

    def make(family="qwen2", seed=0, **shape):
        backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **shape})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in backbone.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                words = "embed_tokens" in name or "lm_head" in name
                p.copy_(1 + 0.2 * noise if "norm" in name else 0.5 * noise if words else 0.2 * noise)
        return backbone

    return make


@pytest.fixture
def open_adapter():
    """open_adapter(backbone, tasks=3, seed=1, **config) -> TALoRA with all of theta0, B, u, v and gate far from 0."""

    def make(backbone, tasks=TASKS, seed=1, **config):
        model = TALoRA(backbone, list(tasks), TALoRAConfig(**{"prompt_length": 5, "rank": 2, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.adapter_state().values():
                sign = torch.where(torch.rand(p.shape, generator=generator) < 0.5, -1.0, 1.0)
                p.copy_(sign * (0.3 + torch.rand(p.shape, generator=generator)))
        return model

    return make
