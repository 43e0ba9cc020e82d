"""Contains Pallas kernels for the products that XLA does not fuse on TPUs."""
