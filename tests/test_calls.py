"""What is made of a function is called as the function is."""

import chex
import jax
import jax.numpy as jnp
import pytest

import wnjax

GV_LEAVES = {"kernel": wnjax.WeightNorm(jnp.full((1, 4), 2.0), jnp.ones((3, 4)))}
X = jax.random.normal(jax.random.key(0), (100, 3))


def fn(p, x, *, params=1.0, fn=0.0):
    return params * (x @ p["kernel"]) + fn


@pytest.mark.parametrize("transform", [wnjax.infer_axes, wnjax.wrap, wnjax.data_init])
def test_any_argument_may_be_passed_by_its_name(transform):
    transformed, options = transform(fn), {"params": 2.0, "fn": 1.0}
    expected = transform(lambda p, x: 2.0 * (x @ p["kernel"]) + 1.0)(GV_LEAVES, X)
    for found in (transformed(p=GV_LEAVES, x=X, **options), transformed(GV_LEAVES, X, **options)):
        if transform is wnjax.infer_axes:
            assert found == expected
        else:
            chex.assert_trees_all_close(found, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="the first argument of the function, 'p', is missing"):
        transformed(x=X)
