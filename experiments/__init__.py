"""Experiments with wnjax: one trainer, run from the files in configs/."""
