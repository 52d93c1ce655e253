"""The analysis of a jaxpr: follows every leaf of the parameters to where it is summed over.

`trace` makes the jaxpr of a function; `walker` passes over it once, forward; `moves`,
`arithmetic` and `sums` hold the rules of the primitives; `views` what is known of a value;
`layout` where the axes of a leaf lie in it; `sizes` compares sizes, which may be symbols. Types
and equations are all that is read.
"""
