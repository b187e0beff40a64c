"""The kernels of 64-bit Arm, compiled for it and run by an emulator: `apt install g++-aarch64-linux-gnu qemu-user`."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("handle", "weight", "pool", "portable", "neon")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}")
def test_neon_and_portable_products_are_right(tmp_path):
    csrc = ROOT / "src/bitquilt/csrc"
    flags = ["-std=c++20", "-O1", "-static", "-ffp-contract=off", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    program = tmp_path / "levels"
    files = [ROOT / "tests/csrc/levels.cpp", *(csrc / f"{name}.cpp" for name in SOURCES)]
    subprocess.run([COMPILER, *flags, f"-I{csrc}", *map(str, files), "-o", str(program)], check=True, timeout=300)
    ran = subprocess.run([EMULATOR, str(program)], check=False, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["neon", "portable"]
