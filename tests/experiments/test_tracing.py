"""The benchmark of tracing, on one block."""

from experiments.tracing import measure, table


def test_equations_that_wrap_adds():
    """At most twelve for each weight; one for the scale, and one for its derivative, among them."""
    weights, seconds = measure(blocks=1, rounds=1)
    assert weights == 6
    plain, fold, wrap = (seconds[name][0].equations for name in ("plain", "fold", "wrap"))
    assert plain < wrap < fold
    assert wrap <= plain + 12 * weights
    assert "1.00 (1.00 to 1.00)" in table(weights, seconds)
