"""Which leaves are weights, and over which axes their norms run."""
