"""The two ways a run ends badly: the caller can mend it (`UserError`), or the result is wrong (`VerificationError`)."""


class UserError(ValueError):
    """A mistake the caller can mend. The message says what, what was got, what was wanted and the fix;
    the command line prints it without a traceback and exits with 2."""


class VerificationError(RuntimeError):
    """A finished result that does not equal what the run computed. The command line exits with 3."""


def decides_itself(recipe: str) -> UserError:
    """For a budget or a plan asked of a recipe whose bits nobody else can give out."""
    return UserError(
        f"recipe {recipe} decides its own bits, from calibration data: nothing can be planned before; give quantize a "
        "number of bits (or bpw, where the recipe has it), and edit the plan.json that it writes"
    )
