MAX_TOKENS: int

def levels() -> list[str]:
    """Instruction sets of this processor that the kernels know, the fastest first."""

class Handle:
    """A weight, checked once, for one instruction set. It reads the described memory: the caller keeps it alive."""

    def __init__(self, level: str, description: list[int]) -> None: ...
    def matmul(
        self, x: int, type: int, tokens: int, columns: int, bias: int, out: int, digits: int, threads: int
    ) -> None:
        """x `[tokens, columns]` times the weight, plus fp32 bias (address 0: none), into out; x and out are of type
        0 fp32, 1 fp16, 2 bf16. `digits`: bytes of a fixed-point activation, 1 to 3."""

    @property
    def reordered(self) -> bool:
        """Whether the columns are stored in another order than their channels'."""

    def reorder(self, x: int, item: int, tokens: int, out: int, threads: int) -> None:
        """x `[tokens, columns]` of `item` bytes each into out, in stored order."""

    def dequantize(self, first: int, last: int, as_stored: bool, out: int, type: int, threads: int) -> None:
        """Rows first..last of the weight into out `[last - first, columns]`, the columns as stored or as they were."""

    def prefill_bytes(self, tokens: int, threads: int) -> int:
        """Of the memory that `prefill` works in."""

    def prefill(self, x: int, tokens: int, columns: int, bias: int, out: int, memory: int, threads: int) -> None:
        """`matmul` of any number of tokens on the matrix units, x in stored order, x and out bf16. Only where
        `matrix_units()`; memory begins at a cache line."""

def matrix_units() -> bool:
    """Whether processor and system let this process use bf16 matrix tiles (AMX)."""

def use_team(address: int) -> None:
    """GOMP_parallel of the OpenMP library that torch uses: unpacking for torch's products runs on its threads."""

class Decoder:
    """One token through a decoder of the Llama kind; csrc/decoder.h explains the arguments. Addresses throughout."""

    def __init__(self, sizes: list[int], epsilon: float, scale: float) -> None: ...
    def add_layer(self, products: list[Handle], arrays: list[int], cache_type: int) -> None: ...
    def set_ends(self, norm: int, cosines: int, sines: int) -> None: ...
    def set_head(self, head: int, type: int) -> None: ...
    def set_product_head(self, head: Handle, gains: int) -> None: ...
    def add_head_part(self, part: Handle, rows: int) -> None: ...
    def step(self, x: int, position: int, logits: int, digits: int, threads: int) -> None: ...

def read_bandwidth(bytes: int, threads: int, rounds: int) -> float:
    """Bytes per second of a plain read loop over that much memory, the fastest of the rounds."""

def kmeans(
    values: int, weights: int, columns: int, count: int, k: int, centroids: int, boundaries: int, threads: int
) -> None:
    """fp64 `[columns, count]`, ascending -> centroids fp64 `[columns, k]`, boundaries int64 `[columns, k + 1]`."""

def sweep_uniform(
    block: list[int],
    sizes: list[int],
    first: int,
    last: int,
    scale: int,
    zero: int,
    two_levels: bool,
    bits: int,
    threads: int,
) -> None:
    """Columns first..last of a block of the sweep, equal steps. `block`: addresses of columns, quantized, codes,
    errors, upper, kept, remainder, 0 for none; `sizes`: stride of `upper`, width, rows, fused rows (csrc/sweep.h)."""

def fit_gains(
    columns: int,
    counted: int,
    width: int,
    rows: int,
    table: int,
    levels: int,
    spread: float,
    gain_values: int,
    gains: int,
    threads: int,
) -> None:
    """Columns fp32 `[width, rows]` -> gains uint8 `[width]`, places in `gain_values` fp32 `[127]`."""

def sweep_shared(
    block: list[int],
    sizes: list[int],
    tables: list[int],
    levels: list[int],
    spreads: list[float],
    table_of: int,
    counted: int,
    gain_values: int,
    gains: int,
    threads: int,
) -> None:
    """A whole block of the sweep, tables with a gain per column; `table_of` int32 `[width]`."""

def nearest(values: int, count: int, levels: int, size: int, chosen: int, threads: int) -> None:
    """fp32 `[count]` as the nearest of `[size]` ascending levels, into fp32 `[count]`."""

def encode(columns: int, width: int, rows: int, levels: int, size: int, codes: int, threads: int) -> None:
    """fp32 `[width, rows]` -> codes uint8 `[width, rows]`; each column has its own levels `[width, size]`."""
