"""One-dimensional k-means: what approximate ones lose against the exact programme and how long each takes; and what a
table shared by all columns is worth against one per column.

    python -m benchmarks.clustering

Weights: columns of the demo model's first up projection (768 values), and 4096 values of Student's t with 5 degrees of
freedom, which has the heavy tails of a large model's. Losses are relative to the least squared error. Other libraries
are compared where they are installed.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import OUTPUT, markdown_table, stamp
from bitquilt.cli.demo import DEMO_MODEL
from bitquilt.layer.grids.codebook import fit_codebook
from bitquilt.layer.grids.kmeans import exact_kmeans, kmeans_reference
from bitquilt.layer.grids.shared_levels import fit_table

Method = Callable[[Tensor, int], Tensor]  # sorted fp64 [n], k -> centroids [k]


def methods() -> dict[str, Method]:
    """Everything that is installed, the exact programme first."""
    found: dict[str, Method] = {
        "exact": lambda x, k: exact_kmeans(x[:, None], torch.ones_like(x)[:, None], k)[0][:, 0],
        "exact, numpy body": lambda x, k: kmeans_reference(x[None], torch.ones_like(x)[None], k)[0][0],
    }
    from scipy.cluster.vq import kmeans2

    def scipy_kmeans(x: Tensor, k: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster
            return torch.from_numpy(kmeans2(x.numpy()[:, None], k, iter=50, minit="++", seed=0)[0][:, 0])

    found["scipy kmeans2, ++"] = scipy_kmeans
    try:
        from sklearn.cluster import KMeans

        for starts in (1, 10):
            found[f"scikit-learn, {starts} start{'s' * (starts > 1)}"] = lambda x, k, starts=starts: torch.from_numpy(
                KMeans(k, n_init=starts, random_state=0).fit(x.numpy()[:, None]).cluster_centers_[:, 0]
            )
    except ImportError:
        pass
    try:
        import ckwrap

        found["ckwrap (exact)"] = lambda x, k: torch.from_numpy(np.asarray(ckwrap.ckmeans(x.numpy(), (k, k)).centers))
    except ImportError:
        pass
    return found


def columns(count: int) -> dict[str, Tensor]:
    """Sorted fp64 `[n, count]`."""
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    up = next(tensor for name, tensor in tensors.items() if "up_proj" in name).double()
    heavy = torch.from_numpy(np.random.default_rng(0).standard_t(5, (4096, count)))
    return {f"demo, {len(up)} values": up[:, :count].sort(dim=0).values, "t(5), 4096 values": heavy.sort(dim=0).values}


def squared_error(values: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of `values` `[n, columns]` to the nearest of `centroids` `[k, columns]`, `[columns]`."""
    distance = (values.unsqueeze(0) - centroids.unsqueeze(1)).square().amin(dim=0)
    return (distance * weights).sum(dim=0)


def compare(count: int) -> list[dict[str, Any]]:
    """Loss above the optimum and milliseconds per column."""
    rows = []
    for data, values in columns(count).items():
        for k in (4, 8, 16):
            best = None
            for name, method in methods().items():
                started = time.perf_counter()
                centroids = torch.stack([method(column, k).double() for column in values.t().contiguous()], dim=1)
                seconds = time.perf_counter() - started
                error = squared_error(values, torch.ones_like(values), centroids)
                best = error if best is None else best
                excess = (error / best - 1) * 100
                row = {"weights": data, "clusters": k, "method": name, "ms per column": 1000 * seconds / count}
                rows.append(row | {"mean excess %": float(excess.mean()), "largest excess %": float(excess.max())})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def shared_against_own() -> list[dict[str, Any]]:
    """What a shared table with gains is worth in bits per weight, at equal squared error (a bit quarters it)."""
    rows = []
    for name, tensor in load_file(DEMO_MODEL / "model.safetensors").items():
        if ".2." not in name or tensor.dim() != 2:
            continue
        weight = tensor.float()
        size = len(weight)
        for bits in (2, 3, 4):
            own, shared = fit_codebook(weight, bits), fit_table(weight, bits).fit(weight)
            errors = [float((weight - grid.quantize(weight)).square().sum()) for grid in (own, shared)]
            cost = [16 * 2**bits / size, 8 / size + 16 * 2**bits / weight.numel()]
            rows.append(
                {
                    "layer": f"{name.split('.')[-2]} {size} x {weight.shape[1]}",
                    "bits": bits,
                    "own tables, bpw": cost[0],
                    "shared, bpw": cost[1],
                    "squared error, shared / own": errors[1] / errors[0],
                    "worth, bpw": cost[0] - cost[1] - math.log2(errors[1] / errors[0]) / 2,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses, tables = compare(arguments.columns), shared_against_own()
    text = markdown_table(list(losses[0]), losses) + "\n" + markdown_table(list(tables[0]), tables)
    OUTPUT.mkdir(exist_ok=True)
    found = {"stamp": stamp(), "losses": losses, "tables": tables}
    (OUTPUT / "clustering.json").write_text(json.dumps(found, indent=1))
    (OUTPUT / "clustering.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
