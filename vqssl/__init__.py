"""Discrete (vector-quantised) self-supervision parts for PyTorch, each usable alone."""

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
