"""The analysis of a function: follows every leaf of the parameters to where it is summed over.

`functions` traces and analyzes a function; `trace` makes its jaxpr; `jaxprs` passes over that once,
forward, into the jaxprs inside (`calls`); `moves`, `arithmetic` and `contractions` have the rules
of the primitives. `views` says what is known of a value, `layout` where the axes of a leaf lie in
it, `sizes` compares sizes, which may be symbols, and `lines` finds the user's line.
"""
