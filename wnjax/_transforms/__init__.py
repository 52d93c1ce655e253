"""Transformations of parameters, and of functions of them."""
