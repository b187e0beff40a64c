"""Evaluation of any model, quantized or not: `evaluate` on a text, `run_tasks` on tasks of lm-eval, `model_size`."""

from bitquilt.report.evaluation.checkpoint_size import ModelSize, fp16_bytes, model_size
from bitquilt.report.evaluation.evaluator import Evaluation, evaluate
from bitquilt.report.evaluation.harness import run_tasks

__all__ = ["Evaluation", "ModelSize", "evaluate", "fp16_bytes", "model_size", "run_tasks"]
