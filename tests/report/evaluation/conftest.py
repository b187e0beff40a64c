"""Tiny random models in training mode with dropout, which an evaluation has to switch off."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ...conftest import build_tiny

VOCAB = 97


def tiny_llama(seed: int, **fields: Any) -> PreTrainedModel:
    """A random Llama of two layers with a context of 64, its weights drawn from `seed`."""
    own = {"vocab_size": VOCAB, "attention_dropout": 0.5}
    return build_tiny("llama", seed, torch.float32, own | fields).train()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama(0)


@pytest.fixture
def other() -> PreTrainedModel:
    return tiny_llama(1)


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(VOCAB, (103,), generator=torch.Generator().manual_seed(0))
