"""`without_former_options` reads a recipe's entry of an older plan.json, whose options may no longer exist.

An option that went has one value now, or two: the usual one, and another with `published=True`.
"""

from collections.abc import Mapping
from typing import Any

from bitquilt.errors import UserError

Values = tuple[Any, ...]
_CLIPPING: dict[str, Values] = {
    "epochs": (8,),
    "rate": (1e-2,),
    "batch": (8,),
    "train_seed": (0,),
    "autocast": (False,),
    "kept_epoch": ("best",),
}
_EFFORT: dict[str, Values] = {
    "batch": (4,),
    "rounding": ("adam",),
    "schedule": ("linear",),
    "scale_rate": (1e-2,),
    "tune_scale_rate": (3e-3,),
    "patience": (0,),
    "train_seed": (0,),
}
_SLIM: dict[str, Values] = {
    "salience": ("cholesky",),
    "group_statistic": ("mean", "sum"),
    "objective": ("kl", "kl_reverse"),
    "candidates": ("all", "published"),
    "candidate_quantizer": ("fitted", "min_max"),
    "search": ("wide", "published"),
    "weighting": ("column", "none"),
    "mask_threshold": (2.0,),
    "mask_factor": (4.0,),
    "one_bit": ("symmetric", "code"),
}
_CMPQ: dict[str, Values] = {
    "statistic": ("l2",),
    "act_rule": ("weight",),
    "outlier_choice": ("measured", "asked"),
    "swap": (0.0,),
    "codebook": ("shared", "channel"),
    "codebook_dtype": ("auto",),
    "row_gains": ("auto", "off"),
    "clustering": ("exact",),
    "iterations": (50,),
    "weighting": ("column",),
    "act_order": (True,),
}
# by recipe and option: the usual value, then that with `published=True` where it is another
FORMER: dict[str, dict[str, Values]] = {
    "rtn": _CLIPPING,
    "gptq": {**_CLIPPING, "weighting": ("column",)},
    "slim-llm": {**_CLIPPING, **_SLIM},
    "slim-llm+": {
        **{option: values for option, values in _CLIPPING.items() if option != "epochs"},
        **_SLIM,
        "batch": (1,),
        "start": ("gptq", "weight"),
        "augmented": (True,),
        "initial": (4.0,),
        "patience": (0,),
    },
    "cmpq": {**_CMPQ, "compensation": (False,), "damp": (0.01,), "alpha": (0.0,), "stream_alpha": (0.0,)},
    "cmpq+": {
        **{option: values[:1] for option, values in _CMPQ.items()},
        **_EFFORT,
        "compensation": (True,),
        "reach": (0.2,),
    },
    "quilt": {**_EFFORT, "reach": (0.5,), "group_order": (True,), "levels": ("auto",)},
    "aptq": {
        **_CLIPPING,
        "sensitivity": ("mean",),
        "hessian": ("attention",),
        "measure_at": ("residual",),
        "probes": (1,),
        "seed": (0,),
    },
    "mg-ptq": {
        **_CLIPPING,
        "one_bit": ("symmetric",),
        "top": (16,),
        "width": (64,),
        "steps": (200,),
        "learning_rate": (1e-3,),
        "budget_weight": (5.0,),
        "straight_through": (True,),
        "seed": (0,),
    },
    "micromix": {"scale_rule": ("ceil", "paper"), "thresholds": ("published",), "six": ("e3m2",), "runs": (32, 1)},
}


def without_former_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of recipe `name` without those that no longer exist.

    Where these have the values of the published variant, `published` is set. Raises UserError for a value that the
    recipe can no longer compute with.
    """
    former = FORMER[name]
    kept = {option: value for option, value in options.items() if option not in former}
    gone = {option: value for option, value in options.items() if option in former}
    choices = {option for option, values in former.items() if len(values) > 1}
    if "published" not in kept and choices and all(gone.get(o, former[o][0]) == former[o][1] for o in choices):
        kept["published"] = True
    published = bool(kept.get("published", False))
    for option, value in gone.items():
        fixed = former[option][-1 if published else 0]
        if value != fixed:
            more = f" ({former[option][1]!r} with published=true)" if option in choices and not published else ""
            raise UserError(
                f"recipe {name}, option {option!r}: got {value!r}; it is no longer an option and is fixed at "
                f"{fixed!r}{more}: leave it out"
            )
    return kept


def usual_values(name: str) -> dict[str, Any]:
    """The value of each option that no longer exists in a report of the recipe's defaults."""
    return {option: values[0] for option, values in FORMER.get(name, {}).items()}
