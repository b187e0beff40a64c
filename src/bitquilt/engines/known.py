"""`ENGINES` by the name that `--to` and `--for` take; `engine_named` finds one."""

from collections.abc import Mapping

from bitquilt.engines.compressed_tensors import COMPRESSED_TENSORS
from bitquilt.engines.engine import Engine
from bitquilt.engines.gguf_engine import GGUF
from bitquilt.engines.gptq_files import GPTQ_FILES
from bitquilt.engines.mlx import MLX
from bitquilt.errors import UserError

ENGINES: Mapping[str, Engine] = {"mlx": MLX, "vllm": COMPRESSED_TENSORS, "gptq": GPTQ_FILES, "gguf": GGUF}


def engine_named(name: str) -> Engine:
    """Return the engine. Raises UserError for a name that is not in `ENGINES`."""
    if name not in ENGINES:
        raise UserError(f"no engine is called {name!r}; wanted {' or '.join(ENGINES)}")
    return ENGINES[name]
