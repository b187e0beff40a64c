"""Tiny random models, made here: nothing is downloaded."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97


def tiny_llama(seed: int, **fields: Any) -> LlamaForCausalLM:
    """A random Llama of two layers, with a context of 64; its weights are of `seed` alone."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "attention_dropout": 0.5,
        }
        | fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture
def other() -> LlamaForCausalLM:
    return tiny_llama(1)


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(VOCAB, (103,), generator=torch.Generator().manual_seed(0))
