"""Which model is measured? `as_model(path or model) -> PreTrainedModel`, refused unless it is a causal LM."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.errors import UserError

# Tokens of the causality check: enough to have a past and a future, few enough to cost nothing.
_PROBE = 8


def as_model(model: Any, device: torch.device | str | None, dtype: torch.dtype | str | None) -> Any:
    """`model` itself when loaded, else what transformers loads from the path or hub id.

    Loads on CUDA where there is one, else on the CPU; in float32 on the CPU, else as stored.
    UserError: no such model, no causal language model, weights missing from the files."""
    if not isinstance(model, str | Path):
        return model
    from transformers import AutoModelForCausalLM

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model} does not load as a causal language model: {error}; give a folder or hub id that "
            "AutoModelForCausalLM can load"
        ) from error
    # transformers fills what it does not find with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{model} lacks {len(missing)} of the model's tensors, {missing[0]} among them; "
            "the folder is incomplete, or holds another kind of model; fetch or quantize it again"
        )
    return loaded.to(device)


def as_tokenizer(tokenizer: Any, model: Any) -> Any:
    """`tokenizer` itself, else the one in the model's folder or hub id, else None."""
    if tokenizer is not None or not isinstance(model, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None  # token ids need none; text then says that there is none


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocab] of `ids` int64 [batch, tokens], on the model's device and in its dtype.

    UserError: the model gives no such logits."""
    ids = ids.to(model.device)
    logits = getattr(model(ids, attention_mask=torch.ones_like(ids), use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        got = "no logits" if logits is None else f"logits {list(logits.shape)}"
        raise UserError(
            f"{type(model).__name__} gives {got} for {list(ids.shape)} tokens, not [batch, tokens, vocab]; "
            "give a causal language model"
        )
    return logits


def check_causal(model: Any, ids: Tensor) -> None:
    """UserError when a later token moves the logits of an earlier one: such a model cannot be scored by
    next-token prediction. `ids` int64 [tokens]; an encoder is found by what it does, not by its name."""
    ids = ids[:_PROBE][None]
    changed = ids.clone()
    changed[0, -1] = 1 if int(ids[0, -1]) == 0 else 0
    if ids.shape[1] < 2:
        return
    before, after = logits_of(model, ids)[0, :-1], logits_of(model, changed)[0, :-1]
    # A causal model gives the same numbers twice, up to the rounding of batched kernels; a one-layer
    # random BERT, the mildest bidirectional model, moves them by more than 1e-3 of their size.
    tolerance = max(1e-4, 8 * torch.finfo(before.dtype).eps) * before.abs().max().item()
    if (before - after).abs().max().item() > tolerance:
        raise UserError(
            f"{type(model).__name__} is not a causal language model: a later token changes the logits of "
            "an earlier one; give a model that predicts the next token"
        )
