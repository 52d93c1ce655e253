"""Gradient transformations of optax."""
