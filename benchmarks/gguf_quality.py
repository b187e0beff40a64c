"""GGUF files at equal bytes: llama.cpp's own quantizer with an importance matrix, and `quantize --for gguf`.

    pip install llama-cpp-python gguf
    python -m benchmarks.gguf_quality demo
    python -m benchmarks.gguf_quality MODEL --types Q2_K Q4_K_M --samples 24

For each type of llama.cpp's, our budget is the size of its file, to the byte. Both calibrate on the same sequences of
C4. The importance matrix is what llama.cpp's own tool collects, the mean square of each layer's inputs, computed here
because its Python package has no tool for it. Both files are run in llama.cpp, against one in the model's own type: KL
divergence and perplexity on the first tokens of WikiText-2's test set, in windows. `embedding`: bits of ours.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitquilt
from benchmarks.common import OUTPUT, SHARED, markdown_table, stamp
from benchmarks.gguf_files import quantize_gguf, rivals
from bitquilt.engines.gguf_engine import GGUF
from bitquilt.model.checkpoint import open_checkpoint
from bitquilt.model.structure import open_skeleton
from bitquilt.planning.exported_size import gguf_entries, settings

TYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "IQ4_XS": 30, "Q4_K_S": 14, "Q4_K_M": 15}  # llama_ftype
CALIBRATION, TEST = SHARED / "text/c4/c4_sample.txt", SHARED / "text/wikitext2/test.raw.txt"
COLUMNS = ("type", "file", "bytes", "KL", "of llama.cpp's", "perplexity", "top-1", "minutes")


class Evaluated:
    """The test tokens, and what the reference says about them."""

    def __init__(self, tokens: list[int], window: int, reference: Path) -> None:
        self.windows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]
        self.reference = [logits.half() for logits in self._logits(reference)]

    def _logits(self, path: Path) -> list[torch.Tensor]:
        llama_cpp, _ = rivals()
        model = llama_cpp.Llama(str(path), n_ctx=len(self.windows[0]), n_batch=512, logits_all=True, verbose=False)
        found = []
        for window in self.windows:
            model.reset()
            model.eval(window)
            found.append(torch.from_numpy(np.array(model.scores[: len(window)], dtype=np.float32)))
        model.close()
        return found

    def scores(self, path: Path) -> dict[str, float]:
        """KL from the reference, perplexity and top-1 agreement of a file."""
        kl = nll = same = 0.0
        for window, before, logits in zip(self.windows, self.reference, self._logits(path), strict=True):
            p, q = before.float().log_softmax(-1), logits.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            nll -= float(q[:-1].gather(1, torch.tensor(window[1:]).unsqueeze(1)).sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
        count = sum(map(len, self.windows))
        return {"KL": kl / count, "perplexity": float(np.exp(nll / (count - len(self.windows)))), "top-1": same / count}


def reference_file(model: Path, path: Path) -> Callable[[str], str]:
    """Write the model in its own type; return the names of its tensors."""
    checkpoint = open_checkpoint(model)
    skeleton = open_skeleton(checkpoint)
    entries = gguf_entries({}, {}, checkpoint.tensors)
    file = GGUF.file(settings(skeleton, ()), checkpoint.folder)
    file.write(path, entries, (checkpoint.read([entry.name])[entry.name] for entry in entries))
    return file.model.name


def importance(model: Path, ids: torch.Tensor, name: Callable[[str], str]) -> dict[str, list[float]]:
    """The mean square of every layer's inputs `[in]`, by GGUF's names."""
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[path] = sums.get(path, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(dim=0)

        return hook

    for path, module in found.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            module.register_forward_pre_hook(watch(path))
    with torch.no_grad():
        for part in ids.split(4):
            found.model(part)
    return {name(f"{path}.weight"): (total / ids.numel()).tolist() for path, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--recipe", default="quilt")
    parser.add_argument("--embedding-bits", type=int, nargs="+", default=[6])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    model = SHARED / "models" / asked.model if (SHARED / "models" / asked.model).is_dir() else asked.model
    llama_cpp, _ = rivals()
    tokenizer, rows = AutoTokenizer.from_pretrained(model), []
    test = tokenizer(TEST.read_text()[: 20 * asked.tokens], add_special_tokens=False)["input_ids"][: asked.tokens]
    text = tokenizer(CALIBRATION.read_text()[: 40 * asked.samples * asked.seq_len], add_special_tokens=False)
    ids = torch.tensor(text["input_ids"][: asked.samples * asked.seq_len]).view(asked.samples, asked.seq_len)
    options = {"recipe": asked.recipe, "samples": asked.samples, "seq_len": asked.seq_len, "engine": "gguf"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name = reference_file(model, folder / "full.gguf")
        evaluated = Evaluated(test, asked.seq_len, folder / "full.gguf")
        rows.append({"type": "full", "bytes": (folder / "full.gguf").stat().st_size})
        rows[-1].update(evaluated.scores(folder / "full.gguf"))
        matrix = importance(model, ids, name)
        for kind in asked.types:
            file = folder / f"{kind}.gguf"
            started = time.perf_counter()
            quantize_gguf(folder / "full.gguf", file, TYPES[kind], llama_cpp, matrix)
            size, theirs = file.stat().st_size, evaluated.scores(file)
            minutes = (time.perf_counter() - started) / 60
            rows.append({"type": kind, "file": "llama-quantize", "bytes": size, **theirs, "minutes": minutes})
            print(markdown_table(COLUMNS, rows[-1:]), flush=True)
            for bits in asked.embedding_bits:
                started = time.perf_counter()
                made, out = folder / f"{kind}-{bits}", folder / f"{kind}-{bits}-gguf"
                budget = bitquilt.Budget("size", size)
                bitquilt.quantize(
                    model, calibration=CALIBRATION, out=made, budget=budget, embedding_bits=bits, **options
                )
                done = bitquilt.export(made, out, "gguf")
                ours = evaluated.scores(out / "model.gguf")
                row = {"type": kind, "file": f"{asked.recipe}, embedding {bits}", "bytes": done.bytes, **ours}
                row |= {"of llama.cpp's": ours["KL"] / theirs["KL"], "minutes": (time.perf_counter() - started) / 60}
                rows.append(row)
                print(markdown_table(COLUMNS, rows[-1:]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "gguf_quality.json").write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=1))
    print(markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
