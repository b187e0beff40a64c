"""Errors of a run: `UserError` for what the caller can correct, `VerificationError` for a wrong result."""


class UserError(ValueError):
    """A mistake that the caller can correct. The message says what happened, what was given, what is allowed and what
    to do; the command line prints it without a traceback and exits with 2."""


class VerificationError(RuntimeError):
    """A finished result that differs from what the run computed. The command line exits with 3."""


def not_plannable(recipe: str) -> UserError:
    """Make the error for a budget or a plan with a user's own recipe that lacks the methods of `Plannable`."""
    return UserError(
        f"recipe {recipe} lacks plan_terms, widths, layout, rounded or column_cost (bitquilt.core.recipe.Plannable), "
        "so a budget cannot be allocated before it runs; add these methods, or leave out the budget"
    )
