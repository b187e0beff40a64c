"""Models to evaluate: `as_model` loads one, `logits_of` runs it, `check_causal` refuses what is not causal,
`check_finite` names the layer where NaN begins."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquilt.core.types import all_finite
from bitquilt.errors import UserError
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import is_encoder_decoder

# Tokens of the causality check: enough for a past and a future, few enough to cost nothing.
_PROBE = 8


def as_model(
    model: Any, device: torch.device | str | None, dtype: torch.dtype | str | None, trust_remote_code: bool = False
) -> Any:
    """Return `model` itself if it is loaded, else what transformers loads from the path or hub id.

    The default device is CUDA if there is one; the default type is float32 on a CPU, else the stored one. Python code
    in the folder runs only with `trust_remote_code`. Raises UserError for a missing model, one that is not a causal
    language model, and incomplete weights."""
    if not isinstance(model, str | Path):
        return model
    from bitquilt.model.transformers_model import class_of, load_pretrained

    checkpoint = open_checkpoint(model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    kind = class_of(checkpoint.model_config.architectures, generates=True)
    loaded, info = load_pretrained(
        kind, checkpoint, trust_remote_code=trust_remote_code, dtype=dtype, output_loading_info=True
    )
    # transformers fills missing tensors with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{model} lacks {len(missing)} of the model's tensors, such as {missing[0]}; "
            "it is incomplete or another kind of model; fetch or quantize it again"
        )
    return loaded.to(device)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return logits [batch, tokens, vocab] of `ids` int64 [batch, tokens], on the model's device and in its dtype.

    Raises UserError if the model gives no such logits."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    if is_encoder_decoder(model):
        return _logits_of_writing_again(model, ids, mask)
    try:
        output = model(ids, attention_mask=mask, use_cache=False)
    except (TypeError, ValueError, OverflowError) as error:  # such as a window that is no number
        raise UserError(
            f"{type(model).__name__} fails on {list(ids.shape)} tokens ({error}): a value of its config.json does not "
            "fit it; copy or quantize it again"
        ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        got = "no logits" if logits is None else f"logits {list(logits.shape)}"
        raise UserError(
            f"{type(model).__name__} gives {got} for {list(ids.shape)} tokens, not [batch, tokens, vocab]; "
            "give a causal language model"
        )
    return logits


def _logits_of_writing_again(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return a decoder's logits, given the tokens before, where the encoder reads all of `ids`.

    Its loss is that of writing the text again. In position t, as in a causal model, they are of token t + 1; what
    follows the last token is not asked for."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder that does not say how its decoder begins, so a text has no "
            "loss; evaluate it on a task of its own"
        )
    logits: Tensor = model(ids, attention_mask=mask, decoder_input_ids=shift(labels=ids), use_cache=False).logits
    return torch.cat([logits[:, 1:], logits[:, -1:]], dim=1)


def check_causal(model: Any, ids: Tensor) -> None:
    """Raise UserError if a later token of `ids` int64 [tokens] changes the logits of an earlier one.

    Such a model cannot be scored by next-token prediction. The check needs no list of model families. An
    encoder-decoder is meant to know the text that it writes."""
    if is_encoder_decoder(model):
        return
    ids = ids[:_PROBE][None]
    changed = ids.clone()
    changed[0, -1] = 1 if int(ids[0, -1]) == 0 else 0
    if ids.shape[1] < 2:
        return
    before, after = logits_of(model, ids)[0, :-1], logits_of(model, changed)[0, :-1]
    # A causal model gives the same numbers twice, up to the rounding of batched kernels. A random BERT of one layer,
    # the mildest bidirectional model, changes them by more than 1e-3 of their size.
    tolerance = max(1e-4, 8 * torch.finfo(before.dtype).eps) * before.abs().max().item()
    if (before - after).abs().max().item() > tolerance:
        raise UserError(
            f"{type(model).__name__} is not a causal language model: a later token changes the logits of "
            "an earlier one; give a model that predicts the next token"
        )


def check_finite(model: Any, logits: Tensor, ids: Tensor) -> None:
    """Raise UserError if `logits` of `ids` int64 [tokens] hold NaN or infinity, naming the layer where they begin.

    -inf alone is fine: some models mask tokens that they never write."""
    if not bool((logits.isnan() | logits.isposinf()).any()):
        return
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [t for t in (output if isinstance(output, tuple | list) else [output]) if isinstance(t, Tensor)]
        if any(t.is_floating_point() and not all_finite(t) for t in tensors):
            found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [m.register_forward_hook(lambda _m, _in, out, n=name: look(n, out)) for name, m in leaves]
    try:
        logits_of(model, ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    where = f"the output of {found[0]} is the first that is not" if found else "every layer's output alone is finite"
    raise UserError(
        f"the model's logits are not finite; {where}: its scales are damaged, or the type overflows; "
        "`bitquilt inspect DIR --verify` checks the files, --dtype float32 has more range"
    )
