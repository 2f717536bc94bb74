"""What the tests share: a smaller micro-world, tiny random backbones of every family, and adapters that hide nothing.

A zero gate hides every bug behind it, and so do a zero bias and a norm of ones: everything here has random values.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import data
from experiments import soak
from model import TALoRA, TALoRAConfig
from tasks import micro

torch.set_num_threads(1)  # tiny tensors gain nothing from more threads, and other numbers of them round differently

SHAPE = dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128, attention_dropout=0.0,
             bos_token_id=None, eos_token_id=None, pad_token_id=0)
TASKS = ["first", "second", "third"]


def resize_world(train_rows, test_rows):
    """What a run does is the same with few rows of a task, and much quicker."""
    micro.TRAIN_ROWS, micro.TEST_ROWS = train_rows, test_rows
    micro._rows.cache_clear()
    data.load_splits.cache_clear()


def small_run(world, run, *more):
    """Options of a run of all stages that takes a third of a second; world: the folder of a backbone."""
    return soak.command(world, run, "--prompt-length", "3", "--rank", "2", *more)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """60 train and 6 test rows of a task, and the folder of a random backbone of one layer that reads them."""
    whole = micro.TRAIN_ROWS, micro.TEST_ROWS
    resize_world(60, 6)
    yield soak.small_world(tmp_path_factory.mktemp("world"))
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
