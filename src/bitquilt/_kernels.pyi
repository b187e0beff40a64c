MAX_TOKENS: int

def levels() -> list[str]:
    """Instruction sets of this processor that the kernels know, the fastest first."""

def matmul(
    level: str,
    description: list[int],
    x: int,
    tokens: int,
    columns: int,
    bias: int,
    out: int,
    digits: int,
    threads: int,
) -> None:
    """fp32 x `[tokens, columns]` times the described weight, plus fp32 bias (address 0: none), into fp32 out."""

def dequantize(level: str, description: list[int], first: int, last: int, out: int, type: int, threads: int) -> None:
    """Rows first..last of the described weight into out `[last - first, columns]`: type 0 fp32, 1 fp16, 2 bf16."""

def read_bandwidth(bytes: int, threads: int, rounds: int) -> float:
    """Bytes per second of a plain read loop over that much memory, the fastest of the rounds."""

def kmeans(
    values: int, weights: int, columns: int, count: int, k: int, centroids: int, boundaries: int, threads: int
) -> None:
    """fp64 `[columns, count]`, ascending -> centroids fp64 `[columns, k]`, boundaries int64 `[columns, k + 1]`."""
