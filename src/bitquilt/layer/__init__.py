"""One weight, tensors only: grids, Hessian, outliers, the GPTQ sweep, assembly, sensitivity."""
