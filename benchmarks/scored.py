"""What all tables of quality share: quantize a shared model, evaluate it on a text that it was not calibrated with."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitquilt
from benchmarks.common import SHARED
from bitquilt.core.plan_file import read_plan
from bitquilt.core.recipe import Recipe
from bitquilt.core.types import LayerPlan
from bitquilt.data.calibration import make_calibration
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton, vocabulary_size
from bitquilt.model.transformers_logging import quiet_transformers
from bitquilt.report.evaluation import Evaluation

# Windows are cut without BOS, as for all published tables; `bitquilt` itself begins each with BOS.
SEQ_LEN = 256
# Calibration and evaluation: different files of the text that each model knows.
TEXTS = {
    "demo": ("books/calibration.txt", "books/evaluation.txt"),
    "stories260k": ("tinystories/calibration.jsonl", "tinystories/evaluation.jsonl"),
    "babyllama-1m-chars": ("tinystories/calibration.jsonl", "tinystories/evaluation.jsonl"),
}


@dataclass(frozen=True)
class Scored:
    """A checkpoint's report, plans and evaluation; seconds of quantizing, by the clock and of the processor."""

    report: dict[str, Any]
    plans: Mapping[str, LayerPlan]
    score: Evaluation
    seconds: float
    cpu_seconds: float

    def row(self) -> dict[str, Any]:
        """What every table begins with."""
        return {
            "bpw": self.report["bpw"],
            "nominal_bits": self.report["nominal_bits"],
            "kl_mean": self.score.kl_mean,
            "perplexity": self.score.perplexity,
            "top1_agreement": self.score.top1_agreement,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
        }


def quantize_and_score(model: str, recipe: str | Recipe, *, tokens: int, **settings: Any) -> Scored:
    """One run on a model of TEXTS, measured on `tokens`. `settings` and errors are those of `bitquilt.quantize`."""
    calibration, evaluation = (SHARED / "text" / text for text in TEXTS[model])
    source = SHARED / "models" / model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        out, started, cpu = Path(folder) / "out", time.perf_counter(), time.process_time()
        result = bitquilt.quantize(source, recipe, calibration, out, seq_len=SEQ_LEN, bos=False, **settings)
        seconds, busy = time.perf_counter() - started, time.process_time() - cpu
        score = bitquilt.evaluate(out, evaluation, reference=source, seq_len=SEQ_LEN, bos=False, max_tokens=tokens)
        return Scored(result.report, read_plan(out / "plan.json").plans, score, seconds, busy)


def calibration_ids(model: str, samples: int, seed: int = 0) -> Tensor:
    """The token ids that a run of ours calibrates on `[samples, tokens]`."""
    checkpoint = open_checkpoint(SHARED / "models" / model)
    calibration = bitquilt.Calibration(
        SHARED / "text" / TEXTS[model][0], samples, seq_len=SEQ_LEN, bos=False, seed=seed
    )
    vocabulary = vocabulary_size(open_skeleton(checkpoint).model)
    return make_calibration(checkpoint, calibration, vocabulary=vocabulary, progress=lambda _text: None)


def score_weights(model: str, weights: Mapping[str, Tensor], *, tokens: int) -> dict[str, Any]:
    """The full-precision model with these `weights` in place of the layers' own, evaluated as ours are."""
    source = SHARED / "models" / model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        module.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
        module.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        text = SHARED / "text" / TEXTS[model][1]
        score = bitquilt.evaluate(Path(folder), text, reference=source, seq_len=SEQ_LEN, bos=False, max_tokens=tokens)
    return {"kl_mean": score.kl_mean, "perplexity": score.perplexity, "top1_agreement": score.top1_agreement}
