"""What the modules of Linen and of NNX have in common."""
