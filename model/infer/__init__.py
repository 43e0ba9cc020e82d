"""Inference: batched, cached generation."""
