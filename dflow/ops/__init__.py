"""Arithmetic on Z/K, straight-through estimators, exact lookup, and drawing orders."""
