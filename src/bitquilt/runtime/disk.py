"""Does the calibration fit on the disk? check_disk(work, checkpoint, recipe, tokens), before the work."""

import shutil
from pathlib import Path

from bitquilt.errors import UserError
from bitquilt.models.checkpoint import Checkpoint
from bitquilt.protocols import PlansModel, Recipe, TunesModel


def check_disk(work: Path, checkpoint: Checkpoint, recipe: Recipe, tokens: int) -> None:
    """Raise UserError when the disk cannot hold what the run will certainly write: the hidden states of `tokens`."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    width = text.get("hidden_size") or text.get("n_embd") or 0
    there = sum(path.stat().st_size for path in work.glob("activations-*.f32"))
    wanted = max(0, _copies(recipe) * 4 * tokens * width - there)
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise UserError(
            f"the calibration activations need {wanted / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB are free; "
            "give --work-dir on another disk, or fewer --samples"
        )


def _copies(recipe: Recipe) -> int:
    """Of the calibration's hidden states that lie on the disk at once: a block's inputs and outputs, those of the
    full-precision model beside them, or, in a pass before the first block or for one after the last, what the first
    block reads."""
    if recipe.needs & {"drift", "full"}:
        return 5 if isinstance(recipe, TunesModel) and recipe.tune_batch else 4
    return 3 if isinstance(recipe, PlansModel) else 2
