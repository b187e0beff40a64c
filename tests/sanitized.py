"""A pytest plugin: the kernels from the folder `BITQUILT_KERNELS` instead of the installed ones (`make sanitize`)."""

import importlib.util
import os
import sys
from pathlib import Path

_NAME = "bitquilt._kernels"
(_file,) = Path(os.environ["BITQUILT_KERNELS"]).glob("_kernels*.so")
_spec = importlib.util.spec_from_file_location(_NAME, _file)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_NAME] = _module
_spec.loader.exec_module(_module)
