"""One weight: grids, Hessian, outliers, the GPTQ sweep, sensitivity. Tensors only."""
