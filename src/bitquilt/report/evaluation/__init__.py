"""How good is a model? `evaluate(model, text, reference=...)`: quantized or not, measured the same way."""

from bitquilt.report.evaluation.checkpoint_size import ModelSize, fp16_bytes, full_precision_size, model_size
from bitquilt.report.evaluation.evaluator import Evaluation, evaluate
from bitquilt.report.evaluation.harness import run_tasks

__all__ = ["Evaluation", "ModelSize", "evaluate", "fp16_bytes", "full_precision_size", "model_size", "run_tasks"]
