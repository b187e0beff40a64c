"""kill -9 at random points, resumed each time: the result must be the uninterrupted run's, byte for byte.

    python -m benchmarks.crash --kills 10

Runs the command line on the packaged demo model, with an installation's own start-up and file handling.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import bitquilt
from benchmarks.common import OUTPUT, stamp

MODEL = Path(bitquilt.__file__).parent / "demo"


def command(out: Path, ids: Path) -> list[str]:
    settings = {"recipe": "slim-llm", "bits": 2, "group-size": 32, "samples": 32, "seq-len": 128, "seed": 0}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    main = [sys.executable, "-c", "from bitquilt.cli import main; main()", "quantize"]
    return [*main, str(MODEL), str(out), "--calibration", str(ids), *flags, "--quiet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as scratch:
        ids, whole, resumed = (Path(scratch) / name for name in ("ids.safetensors", "whole", "resumed"))
        generator = torch.Generator().manual_seed(0)
        save_file({"input_ids": torch.randint(0, 4096, (32, 128), generator=generator)}, ids)
        started = time.perf_counter()
        subprocess.run(command(whole, ids), check=True)
        seconds = time.perf_counter() - started
        killed = []
        while len(killed) < arguments.kills:
            process = subprocess.Popen(command(resumed, ids), start_new_session=True)
            delay = chance.uniform(0.2, 0.9) * seconds
            try:
                process.wait(delay)
                print("finished before it could be killed; starting over", file=sys.stderr)
                subprocess.run(["rm", "-rf", str(resumed)], check=True)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                work = resumed.with_name("resumed.work")
                killed.append(len(list(work.glob("block-*.json"))))
        subprocess.run(command(resumed, ids), check=True)
        files = sorted(path.name for path in whole.iterdir() if path.name != "report.json")
        same = all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)
    result = {
        "kills": len(killed),
        "blocks done at each kill": killed,
        "files compared": len(files),
        "same bytes": same,
    }
    (OUTPUT / "crash.json").write_text(json.dumps({"stamp": stamp(), **result}, indent=1))
    print(json.dumps(result))
    if not same:
        raise SystemExit("the resumed run wrote other bytes")


if __name__ == "__main__":
    main()
