"""Products for NVIDIA GPUs that XLA does not fuse by itself, in Pallas."""
