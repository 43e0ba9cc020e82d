"""Products for TPUs that XLA does not fuse by itself, in Pallas."""
