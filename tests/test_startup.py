"""What a process has imported, and when transformers learns the format. Fresh processes: this one has everything."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "scipy",
    "matplotlib",
    "pandas",
    "sklearn",
    "datasets",
    "huggingface_hub",
    "accelerate",
)


def imported(code: str, *arguments: str) -> set[str]:
    """The packages in `sys.modules` after `code`, however it ends."""
    told = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    done = subprocess.run(
        [sys.executable, "-c", told + code, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stderr.splitlines()[-1].split())


def test_the_package_and_the_list_of_verbs_import_nothing_heavy() -> None:
    code = "import bitquilt; from bitquilt.cli import main; assert 'plan' in dir(bitquilt); main()"
    assert imported(code, "--help").isdisjoint(HEAVY)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "bitquilt", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()[0]) == (0, "bitquilt")


def test_importing_changes_nothing_but_the_finder_that_registers_the_format() -> None:
    code = """
import os, sys, warnings, logging, signal, random
state = lambda: (dict(os.environ), list(warnings.filters), list(logging.root.handlers), random.getstate(),
                 signal.getsignal(signal.SIGINT), sys.excepthook)
before, finders = state(), list(sys.meta_path)
import bitquilt
assert state() == before
assert sys.meta_path[1:] == finders and type(sys.meta_path[0]).__module__ == "bitquilt.serve.registration"
"""
    imported(code)


def test_a_plan_of_a_model_like_llama_does_not_import_transformers(make_model: Callable[..., Path]) -> None:
    found = imported("from bitquilt.cli import main; main()", "plan", str(make_model("llama")), "--recipe", "rtn")
    assert found & set(HEAVY) == {"torch"}
    assert "torch._dynamo" not in found


def test_a_name_that_does_not_exist() -> None:
    import bitquilt

    with pytest.raises(AttributeError, match="module 'bitquilt' has no attribute 'quantise'"):
        bitquilt.quantise  # type: ignore[attr-defined]  # noqa: B018
    assert {"quantize", "load", "plan", "UserError"} <= set(dir(bitquilt))
    assert all(getattr(bitquilt, name) is not None for name in bitquilt.__all__)
