"""Programs of v in the place of w, rewritten from those of w."""
