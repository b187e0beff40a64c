"""One-dimensional k-means of many columns: `exact_kmeans` finds the optimum.

On a line the best clusters are intervals of the sorted values, so the optimum can be computed: dynamic programming over
prefixes, where the best last boundary never moves left as the prefix grows (quadrangle inequality), hence
O(k n log n) by divide and conquer. Wu 1991, Optimal quantization by matrix searching. The numpy body is the definition
and the fallback; csrc/kmeans.cpp is the same programme, one column per step: 4096 values in 16 clusters take 7 ms
instead of 60 on one busy core (benchmarks/clustering.py).
"""

import numpy as np
import torch
from torch import Tensor

from bitquilt.ops import cpu_kernels

Floats64 = np.ndarray
# Elements of one batch of columns: the working set of a level (about ten such arrays of float64) stays near 10 MB.
_BATCH_ELEMENTS = 2**17
_TINY = 1e-300


def exact_kmeans(values: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k-means of least weighted squared error of each column.

    `values` fp64 `[n, columns]`, ascending per column; `weights` `[n, columns]` >= 0 -> centroids fp64 `[k, columns]`,
    ascending, and boundaries int64 `[k + 1, columns]`: cluster c holds the values boundaries[c] .. boundaries[c + 1].
    An empty cluster repeats a neighbour's centroid. Raises ValueError if k < 1 or a column is empty.
    """
    _check_clusters(k)
    if len(values) < 1:
        raise ValueError(f"values is {list(values.shape)}; wanted at least one row")
    x = values.detach().cpu().double().t().contiguous()
    w = weights.detach().cpu().double().t().contiguous()
    if cpu_kernels.level() != cpu_kernels.REFERENCE:
        centroids, boundaries = cpu_kernels.kmeans(x, w, k)
    else:
        centroids, boundaries = kmeans_reference(x, w, k)
    device = values.device
    return centroids.t().contiguous().to(device), boundaries.t().contiguous().to(device)


def kmeans_reference(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition, in numpy: fp64 `[columns, n]` -> centroids `[columns, k]`, boundaries `[columns, k + 1]`."""
    columns, n = x.shape
    boundaries = np.empty((columns, k + 1), dtype=np.int64)
    centroids = np.empty((columns, k))
    batch = max(1, _BATCH_ELEMENTS // (n + 1))
    for start in range(0, columns, batch):
        part = slice(start, min(start + batch, columns))
        boundaries[part], centroids[part] = _dynamic_programme(x.numpy()[part], w.numpy()[part], k)
    # means of neighbouring clusters of equal values may differ in the last bit and be out of order
    np.maximum.accumulate(centroids, axis=1, out=centroids)
    return torch.from_numpy(centroids), torch.from_numpy(boundaries)


def _check_clusters(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; wanted at least one cluster")


def _dynamic_programme(x: Floats64, w: Floats64, k: int) -> tuple[Floats64, Floats64]:
    """Boundaries `[columns, k + 1]` and centroids `[columns, k]` of a batch of columns `[columns, n]`."""
    columns, n = x.shape
    total = w.sum(1, keepdims=True)
    # around the mean the prefix sums lose the fewest digits
    centre = (w * x).sum(1, keepdims=True) / np.maximum(total, _TINY)
    x = x - centre
    s0, s1, s2 = (np.pad(np.cumsum(s, axis=1), ((0, 0), (1, 0))) for s in (w, w * x, w * x * x))
    best = s2 - s1**2 / np.maximum(s0, _TINY)  # one cluster for each prefix
    splits = []
    for _ in range(2, k):
        best, split = _one_cluster_more(best, s0, s1, s2)
        splits.append(split)
    boundaries = np.zeros((columns, k + 1), dtype=np.int64)
    boundaries[:, k] = n
    rows = np.arange(columns)
    if k > 1:
        tail = best - s2 - (s1[:, -1:] - s1) ** 2 / np.maximum(s0[:, -1:] - s0, _TINY)
        boundaries[:, k - 1] = tail.argmin(1)
    for c, split in zip(range(k - 2, 0, -1), reversed(splits), strict=True):
        boundaries[:, c] = split[rows, boundaries[:, c + 1]]
    inside = np.diff(np.take_along_axis(s0, boundaries, 1), axis=1)
    sums = np.diff(np.take_along_axis(s1, boundaries, 1), axis=1)
    means = np.where(inside > 0, sums / np.maximum(inside, _TINY), np.nan)
    return boundaries, _fill_empty(means) + np.where(total > 0, centre, 0.0)


def _one_cluster_more(best: Floats64, s0: Floats64, s1: Floats64, s2: Floats64) -> tuple[Floats64, Floats64]:
    """The least errors of all prefixes `[columns, n + 1]` with one more cluster than `best`, and where it starts.

    Prefixes are solved from the coarsest stride to the finest; each searches between the boundaries of its solved
    neighbours, so a stride costs n + (number of prefixes) candidates per column.
    """
    columns, size = best.shape
    base = np.arange(columns)[:, None] * size
    flat0, flat1 = s0.ravel(), s1.ravel()
    reduced = (best - s2).ravel()
    error, split = np.zeros_like(best), np.zeros((columns, size), dtype=np.int64)
    stride = 1 << (size - 1).bit_length()
    while stride > 1:
        half = stride // 2
        ends = np.arange(half, size, stride)
        low = split[:, ends - half]
        high = np.broadcast_to(ends, low.shape).copy()
        solved = ends + half < size
        high[:, solved] = np.minimum(high[:, solved], split[:, ends[solved] + half])
        counts = (high - low + 1).ravel()
        first = np.cumsum(counts) - counts
        candidate = np.repeat((base + low).ravel() - first, counts) + np.arange(counts.sum())
        at = (base + ends).ravel()
        gain = np.repeat(flat1[at], counts) - flat1[candidate]
        gain *= gain
        gain /= np.maximum(np.repeat(flat0[at], counts) - flat0[candidate], _TINY)
        value = reduced[candidate] - gain
        least = np.minimum.reduceat(value, first)
        hits = np.flatnonzero(value == np.repeat(least, counts))
        chosen = hits[np.searchsorted(hits, first)]  # the leftmost of each prefix
        split[:, ends] = (candidate[chosen] - base.repeat(len(ends), axis=1).ravel()).reshape(columns, -1)
        error[:, ends] = least.reshape(columns, -1) + s2[:, ends]
        stride = half
    return error, split


def _fill_empty(means: Floats64) -> Floats64:
    """Give empty clusters (NaN) the centroid on their left, leading ones that on their right, 0 if all are empty."""
    index = np.where(np.isnan(means), -1, np.arange(means.shape[1]))
    left = np.maximum.accumulate(index, axis=1)
    leading = np.where(index >= 0, index, means.shape[1]).min(axis=1, keepdims=True)
    source = np.where(left >= 0, left, leading)
    empty = source >= means.shape[1]
    return np.where(empty, 0.0, np.take_along_axis(means, np.minimum(source, means.shape[1] - 1), 1))
