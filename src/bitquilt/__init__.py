"""Bitquilt: fit a language model into the memory you have.

    import bitquilt
    bitquilt.quantize("path/or/hub-id", "slim-llm", calibration="text.txt", out="small", bits=2, group_size=32)
    model = bitquilt.load("small")
    print(bitquilt.evaluate("small", "held-out.txt", reference="path/or/hub-id"))

Importing the package registers the checkpoint format with transformers, whichever of the two is imported first, and
changes nothing else. Torch and transformers are imported with the first name that needs them.
"""

from typing import TYPE_CHECKING

from bitquilt._lazy import lazy_names
from bitquilt._version import __version__
from bitquilt.serve.registration import register

if TYPE_CHECKING:
    from bitquilt.api import Result, load, quantize
    from bitquilt.core.budget import Budget
    from bitquilt.core.settings import Calibration, Selection
    from bitquilt.errors import UserError, VerificationError
    from bitquilt.exporter import Exported, export
    from bitquilt.planning.forecast import Forecast
    from bitquilt.planning.plan_model import measure_model, plan
    from bitquilt.report.evaluation import Evaluation, evaluate

__all__ = [
    "Budget",
    "Calibration",
    "Evaluation",
    "Exported",
    "Forecast",
    "Result",
    "Selection",
    "UserError",
    "VerificationError",
    "__version__",
    "evaluate",
    "export",
    "load",
    "measure_model",
    "plan",
    "quantize",
]

register()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Budget": "bitquilt.core.budget",
        "Calibration": "bitquilt.core.settings",
        "Evaluation": "bitquilt.report.evaluation",
        "Exported": "bitquilt.exporter",
        "Forecast": "bitquilt.planning.forecast",
        "Result": "bitquilt.api",
        "Selection": "bitquilt.core.settings",
        "UserError": "bitquilt.errors",
        "VerificationError": "bitquilt.errors",
        "evaluate": "bitquilt.report.evaluation",
        "export": "bitquilt.exporter",
        "load": "bitquilt.api",
        "measure_model": "bitquilt.planning.plan_model",
        "plan": "bitquilt.planning.plan_model",
        "quantize": "bitquilt.api",
    },
)
