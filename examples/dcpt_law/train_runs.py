"""Train tiny byte-level transformers on mixtures of two texts and write `runs.csv` for `bitquilt law fit`.

Each size is first trained on the general text alone, then continued from that same checkpoint once per mixture
ratio: the set-up of the D-CPT Law (arXiv 2406.01375), some six orders of magnitude smaller. `n_tokens` counts
the bytes of the continued part only. Every evaluation writes two rows, one per text; in each, `ratio` is the
share of THAT text in the mixture.

    python examples/dcpt_law/train_runs.py --out examples/dcpt_law/runs.csv

About a quarter of an hour on one core. Data: `--shared`, else $BITQUILT_SHARED, else ../shared.
"""

import argparse
import copy
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64
BATCH = 8  # sequences a step: 512 bytes. So few bytes are better spent on many small steps
WARM_UP = 40
LEARNING_RATE = 2e-3  # at width 32, falling with the root of the width (best of 1e-3, 2e-3, 4e-3 at both ends)
AVERAGED = 0.98  # weights are averaged over about 50 steps for evaluation, which quiets the constant rate
SIZES = {"xs": (32, 2), "s": (48, 2), "m": (64, 3), "l": (96, 3)}  # width, blocks: 43k to 388k parameters
DOMAIN_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
EVALUATED_STEPS = (150, 225, 340, 510, 760, 1140, 1700, 2400)  # 0.08 to 1.2 million bytes
GENERAL, DOMAIN = "books", "shakespeare"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 16
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ByteModel(nn.Module):
    """A pre-norm transformer over bytes, forward [batch, length] -> logits [batch, length, 256]."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=width**-0.5)
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_texts(shared: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(train, validation) bytes of both texts; the validation text is never trained on."""
    play = (shared / "text/shakespeare/tinyshakespeare.txt").read_bytes()
    cut = len(play) * 95 // 100
    train = {GENERAL: (shared / "text/books/calibration.txt").read_bytes(), DOMAIN: play[:cut]}
    valid = {GENERAL: (shared / "text/books/evaluation.txt").read_bytes(), DOMAIN: play[cut:]}

    def as_tensor(text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    return {k: as_tensor(v) for k, v in train.items()}, {k: as_tensor(v) for k, v in valid.items()}


def batches(train: dict[str, Tensor], domain_share: float, seed: int) -> Iterator[Tensor]:
    """Endless [BATCH, CONTEXT + 1]. The same seed gives the same dice for every share, so runs are paired."""
    dice = torch.Generator().manual_seed(seed)
    while True:
        place = torch.rand(BATCH, generator=dice)
        from_domain = torch.rand(BATCH, generator=dice) < domain_share
        rows = []
        for where, domain in zip(place.tolist(), from_domain.tolist(), strict=True):
            text = train[DOMAIN if domain else GENERAL]
            start = int(where * (len(text) - CONTEXT - 1))
            rows.append(text[start : start + CONTEXT + 1])
        yield torch.stack(rows)


def train_steps(model: ByteModel, data: Iterator[Tensor], steps: int) -> Iterator[tuple[int, ByteModel]]:
    """Yield (step, averaged model) after each step. Constant rate after a warm-up: every step is an end point."""
    averaged = copy.deepcopy(model)
    rate = LEARNING_RATE * (32 / model.tokens.embedding_dim) ** 0.5
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / WARM_UP)
        rows = next(data)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - AVERAGED)
        yield step, averaged


@torch.no_grad()
def evaluate(model: ByteModel, text: Tensor, windows: int = 384) -> float:
    """Mean loss, nats per byte, over evenly spaced windows of the text: always the same ones."""
    starts = torch.linspace(0, len(text) - CONTEXT - 2, windows).long()
    rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()])
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BITQUILT_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("runs.csv"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--general-steps", type=int, default=1500, help="steps on the general text alone, first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, valid = read_texts(args.shared)
    began = time.monotonic()
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["n_params", "n_tokens", "ratio", "loss", "domain"])
        for name in args.sizes:
            torch.manual_seed(args.seed)
            base = ByteModel(*SIZES[name])
            count = sum(p.numel() for p in base.parameters())
            for _ in train_steps(base, batches(train, 0.0, args.seed), args.general_steps):
                pass
            for share in DOMAIN_SHARES:
                model = copy.deepcopy(base)
                data = batches(train, share, args.seed + 1)
                for step, averaged in train_steps(model, data, EVALUATED_STEPS[-1]):
                    if step in EVALUATED_STEPS:
                        tokens = step * BATCH * CONTEXT
                        for text, ratio in ((GENERAL, 1 - share), (DOMAIN, share)):
                            loss = evaluate(averaged, valid[text])
                            writer.writerow([count, tokens, f"{ratio:g}", f"{loss:.5f}", text])
                file.flush()
                print(
                    f"{time.monotonic() - began:6.0f} s  {name:2} {count:7,} parameters  "
                    f"{DOMAIN} {share:4.0%}  last loss {loss:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
