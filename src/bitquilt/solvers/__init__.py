"""Choosing codes: from a weight, a factor of the Hessian and grids, all plain tensors."""
