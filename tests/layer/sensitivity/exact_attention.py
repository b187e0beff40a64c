"""A tiny attention in double precision and the exact Gauss-Newton traces and row-block sums of its projections."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """`x` `[T, d]`; `q` `[heads * width, d]`, `k`, `v` `[kv_heads * width, d]`, `o` `[d, heads * width]`."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    width: int
    rotary: bool = True

    @property
    def heads(self) -> int:
        return len(self.q) // self.width

    @property
    def sharing(self) -> int:
        """Query heads per key and value head."""
        return len(self.q) // len(self.k)

    def rotations(self) -> Tensor:
        """R_t `[T, width, width]`."""
        matrices = torch.eye(self.width, dtype=self.x.dtype).repeat(len(self.x), 1, 1)
        if self.rotary:
            for t in range(len(self.x)):
                for i in range(0, self.width, 2):
                    angle = torch.tensor(t / 10.0 ** (i / self.width), dtype=self.x.dtype)
                    matrices[t, i : i + 2, i : i + 2] = torch.stack(
                        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
                    )
        return matrices

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, values `[heads, T, width]`, probabilities `[heads, T, T]`, head outputs."""

        def split(weight: Tensor) -> Tensor:
            return (self.x @ weight.t()).unflatten(1, (-1, self.width)).transpose(0, 1)

        rotations = self.rotations()
        queries = torch.einsum("tij,htj->hti", rotations, split(self.q))
        keys = torch.einsum("tij,htj->hti", rotations, split(self.k)).repeat_interleave(self.sharing, dim=0)
        values = split(self.v).repeat_interleave(self.sharing, dim=0)
        scores = queries @ keys.transpose(1, 2) / self.width**0.5
        causal = torch.ones(len(self.x), len(self.x), dtype=torch.bool).tril()
        probabilities = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        return queries, keys, values, probabilities, probabilities @ values

    def output(self) -> Tensor:
        """y `[T, d]`."""
        return self.parts()[-1].transpose(0, 1).flatten(1) @ self.o.t()

    def head_columns(self) -> Tensor:
        """A_h `[heads, d, width]`."""
        return self.o.unflatten(1, (-1, self.width)).permute(1, 0, 2)

    def exact_o(self) -> tuple[Tensor, Tensor]:
        """Trace and B of the output projection."""
        z = self.parts()[-1].transpose(0, 1).flatten(1)
        products = 2 * len(self.o) * z.t() @ z
        return products.trace(), products

    def exact_v(self) -> tuple[Tensor, Tensor]:
        """Heads that share values are added before squaring: cross terms count."""
        mixed = self.parts()[3] @ self.x  # xbar [heads, T, d]
        columns = self.head_columns()
        products = torch.zeros(self.x.shape[1], self.x.shape[1], dtype=self.x.dtype)
        for first in range(0, self.heads, self.sharing):
            for h in range(first, first + self.sharing):
                for g in range(first, first + self.sharing):
                    products += 2 * (columns[h] * columns[g]).sum() * mixed[h].t() @ mixed[g]
        return products.trace(), products

    def exact_q(self) -> tuple[Tensor, Tensor]:
        """dy_t = A M_t^T dW x_t."""
        _, keys, values, probabilities, outputs = self.parts()
        rotations, columns = self.rotations(), self.head_columns()
        products = torch.zeros(self.x.shape[1], self.x.shape[1], dtype=self.x.dtype)
        for h in range(self.heads):
            for t in range(len(self.x)):
                spread = torch.einsum("s,sk,sv->kv", probabilities[h, t], keys[h], values[h] - outputs[h, t])
                matrix = rotations[t].t() @ spread / self.width**0.5
                products += 2 * (matrix @ columns[h].t()).square().sum() * torch.outer(self.x[t], self.x[t])
        return products.trace(), products

    def exact_k(self) -> tuple[Tensor, Tensor]:
        """No Kronecker form under rotary positions: the Jacobian of each token and head is written out."""
        queries, _, values, probabilities, outputs = self.parts()
        rotations, columns = self.rotations(), self.head_columns()
        products = torch.zeros(self.x.shape[1], self.x.shape[1], dtype=self.x.dtype)
        for first in range(0, self.heads, self.sharing):
            for t in range(len(self.x)):
                jacobian = torch.zeros(len(self.o), self.width, self.x.shape[1], dtype=self.x.dtype)
                for h in range(first, first + self.sharing):
                    for s in range(t + 1):
                        direction = rotations[s].t() @ queries[h, t]
                        effect = columns[h] @ (values[h, s] - outputs[h, t]) * probabilities[h, t, s]
                        jacobian += torch.einsum("i,k,d->ikd", effect, direction, self.x[s]) / self.width**0.5
                flat = jacobian.flatten(0, 1)
                products += 2 * flat.t() @ flat
        return products.trace(), products


def tiny(heads: int = 4, kv_heads: int = 2, rotary: bool = True, tokens: int = 6, seed: int = 0) -> Attention:
    """T = 6, d = 10, head width 4."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Attention(
        drawn(tokens, 10), drawn(heads * 4, 10), drawn(kv_heads * 4, 10), drawn(kv_heads * 4, 10), drawn(10, heads * 4),
        4, rotary,
    )  # fmt: skip


def jacobian_of(attention: Attention, name: str) -> Tensor:
    """d y / d W by automatic differentiation, `[T, d, out, in]`."""
    return torch.autograd.functional.jacobian(
        lambda weight: replace(attention, **{name: weight}).output(), getattr(attention, name)
    )
