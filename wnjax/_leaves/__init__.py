"""(g, v) leaves, and trees that hold them."""
