"""`register` adds the checkpoint format to transformers: immediately, or after its quantizers load.

transformers keeps its quantizers in a table of `transformers.quantizers.auto`, which a program imports with the first
model. Importing it to write one line there would cost every program three seconds, so the import is watched instead.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_OURS = "bitquilt.serve.quantizer"


def register() -> None:
    """Register once per process; further calls change nothing."""
    if _TABLE in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Find `transformers.quantizers.auto` through the other finders, and have our classes put into its table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Filled(spec.loader)
                return spec
        return None


class _Filled(Loader):
    """The module's own loader, which then imports our two classes into the table."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        importlib.import_module(_OURS)
