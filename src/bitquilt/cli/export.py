"""`bitquilt export DIR OUT --to mlx`: a checkpoint in the files of another engine."""

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bitquilt.cli.options import Quantized
from bitquilt.cli.output import Json, Quiet, calm, print_commands, print_fact, print_json, stdout
from bitquilt.core.units import size_text
from bitquilt.engines.known import ENGINES
from bitquilt.exporter import Exported
from bitquilt.exporter import export as run

_NEXT = {
    "mlx": "mlx_lm.generate --model {} --prompt 'Once upon a time'",
    "vllm": "vllm serve {}",
    "gptq": "vllm serve {}",
    "gguf": "llama-cli -m {}/model.gguf -p 'Once upon a time'",
}


def export(
    folder: Quantized,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write the export to.")],
    to: Annotated[str, Option(metavar="ENGINE", help=f"Engine that will run it: {', '.join(ENGINES)}.")],
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Convert, compare every weight with the checkpoint's, and say how far they are apart."""
    with calm(quiet):
        done = run(folder, out, to)
    if json_output:
        print_json(asdict(done) | {"folder": str(done.folder)})
    elif not quiet:
        _summarize(done)


def _summarize(done: Exported) -> None:
    forms = Counter((held.bits, held.group_size, held.kind) for held in done.layers.values())
    shown = ", ".join(
        f"{count} x {kind or f'{bits} bits in groups of {size}'}" for (bits, size, kind), count in sorted(forms.items())
    )
    stdout.print(str(done.folder), style="bold", markup=False, soft_wrap=True)
    print_fact(stdout, "layers", shown)
    print_fact(stdout, "size", f"{done.bytes} bytes ({size_text(done.bytes)}) in the whole folder")
    if done.wider:
        text = f"{len(done.wider)} layers take more bits than in the checkpoint, such as {done.wider[0]}"
        print_fact(stdout, "wider", f"{text}: {ENGINES[done.engine].title} holds one width per layer", style="yellow")
    if done.window is not None:
        text = f"{ENGINES[done.engine].title} ignores this model's sliding window of {done.window} tokens"
        print_fact(stdout, "window", f"{text}: longer texts come out differently", style="yellow")
    apart = done.difference
    text = f"at most {apart.absolute:.3g} in any weight, {apart.relative:.2g} of the largest weight of {apart.layer}"
    print_fact(stdout, "difference", text if apart.absolute else "none: every weight is the checkpoint's")
    print_commands([_NEXT[done.engine].format(shlex.quote(str(done.folder)))])
