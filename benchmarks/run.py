"""Every benchmark, one after the other: `make bench`. Results as JSON and markdown in benchmarks/output."""

import subprocess
import sys

BENCHMARKS = (
    "layer", "clustering", "channels", "kernels", "activations", "memory", "crash", "quality", "curve", "recipes",
)  # fmt: skip


def main() -> None:
    for name in BENCHMARKS:
        print(f"== benchmarks.{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
