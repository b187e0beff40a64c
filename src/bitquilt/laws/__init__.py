"""Laws that predict a loss before it is paid for: D-CPT (mixtures), cross-domain, and loss against bits.

Start at `dcpt.py`; `fit.py` is the one fitter under every law.
"""

from bitquilt.laws.axes import LawWarning
from bitquilt.laws.bpw import BpwLaw
from bitquilt.laws.cross_domain import CrossDomainLaw, early_signals
from bitquilt.laws.data import Runs, read_points, read_runs
from bitquilt.laws.dcpt import DCPTLaw, Sign
from bitquilt.laws.files import LawFile, load, save
from bitquilt.laws.fit import BestFit, Form, Goodness, goodness, solve
from bitquilt.laws.optimise import Choice, GeneralBound, best_ratio, best_scarce_ratio, best_under_compute
from bitquilt.laws.summary import FitReport, Prediction
from bitquilt.laws.validate import CrossValidation, cross_validate

__all__ = [
    "BestFit",
    "BpwLaw",
    "Choice",
    "CrossDomainLaw",
    "CrossValidation",
    "DCPTLaw",
    "FitReport",
    "Form",
    "GeneralBound",
    "Goodness",
    "LawFile",
    "LawWarning",
    "Prediction",
    "Runs",
    "Sign",
    "best_ratio",
    "best_scarce_ratio",
    "best_under_compute",
    "cross_validate",
    "early_signals",
    "goodness",
    "load",
    "read_points",
    "read_runs",
    "save",
    "solve",
]
