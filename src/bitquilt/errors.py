"""The two ways a run ends badly: the caller can mend it (`UserError`), or the result is wrong (`VerificationError`)."""


class UserError(ValueError):
    """A mistake the caller can mend. The message says what, what was got, what was wanted and the fix;
    the command line prints it without a traceback and exits with 2."""


class VerificationError(RuntimeError):
    """A finished result that does not equal what the run computed. The command line exits with 3."""


def not_plannable(recipe: str) -> UserError:
    """For a budget or a plan asked of a recipe, somebody's own, that lacks the methods which a plan needs."""
    return UserError(
        f"recipe {recipe} lacks widths, layout, rounded and column_cost (bitquilt.core.recipe.Plannable), so a budget "
        "cannot be allocated before it runs; add these methods, or leave out the budget"
    )
