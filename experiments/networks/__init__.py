"""The networks that are trained, in Linen."""
