"""`python -m tests.stream.on_second_device MODEL TOKENS OUT NAME OPTIONS ...`: quantize MODEL by the recipe NAME with
OPTIONS (JSON) into OUT/NAME, computing the blocks on a device that refuses to be mixed with the host (`tests.devices`).

A program of its own: a new kind of device is known to a whole process.
"""

import json
import sys
from pathlib import Path

import torch

import bitquilt
from bitquilt import api
from bitquilt.stream import hidden_states
from tests.devices import DEVICE, SecondDevice

COMMON = {"samples": 4, "seq_len": 8, "skip": ("*.1.*", "*.self_attn.*")}  # three layers: it is Python all the way down


def main(model: str, tokens: str, out: str, *asked: str) -> None:
    torch.set_num_threads(1)
    api.choose_device = lambda _name: DEVICE
    hidden_states.stays_on_device = lambda nbytes, device: device == DEVICE
    for name, options in zip(asked[::2], asked[1::2], strict=True):
        with SecondDevice() as there:
            bitquilt.quantize(model, name, tokens, Path(out) / name, **COMMON, **json.loads(options))
        print(json.dumps({"recipe": name, "operations": there.operations}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
