"""How good is a model? `evaluate(model, text, reference=...)`: quantized or not, measured the same way."""

from bitquilt.evaluation.harness import run_tasks
from bitquilt.evaluation.measure import Evaluation, evaluate
from bitquilt.evaluation.size import ModelSize, fp16_bytes, full_precision_size, model_size

__all__ = ["Evaluation", "ModelSize", "evaluate", "fp16_bytes", "full_precision_size", "model_size", "run_tasks"]
