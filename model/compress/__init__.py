"""Compression: the registry of techniques, recipes of them, calibration and the pipeline."""

from model.compress import techniques as techniques
