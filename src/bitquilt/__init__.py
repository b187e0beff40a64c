"""Bitquilt: fit a language model into the memory you have.

    import bitquilt
    bitquilt.quantize("path/or/hub-id", "slim-llm", calibration="text.txt", out="small", bits=2, group_size=32)
    model = bitquilt.load("small")
    print(bitquilt.evaluate("small", "held-out.txt", reference="path/or/hub-id"))

Importing the package registers the checkpoint format with transformers.
"""

# torch and transformers make a million objects that stay: looking for garbage among them took 0.6 of 4.1 s
import gc

_collecting = gc.isenabled()
gc.disable()
try:
    import bitquilt.integrations.transformers  # noqa: F401  registers the format
    from bitquilt._version import __version__
    from bitquilt.allocation.budget import Budget
    from bitquilt.api import Result, load, quantize
    from bitquilt.errors import UserError, VerificationError
    from bitquilt.evaluation import Evaluation, evaluate
    from bitquilt.fit import Outlook, measure_model, plan
finally:  # an import that fails leaves the process as it was
    if _collecting:
        gc.enable()
    del gc, _collecting

__all__ = [
    "Budget",
    "Evaluation",
    "Outlook",
    "Result",
    "UserError",
    "VerificationError",
    "__version__",
    "evaluate",
    "load",
    "measure_model",
    "plan",
    "quantize",
]
