"""Neurons of zeros, and of lengths that squares do not represent, on any device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnjax

pytestmark = [pytest.mark.accelerator, pytest.mark.usefixtures("optimized")]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-17, 1e21, 3e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_v_out_of_range_gives_zeros_not_nans(dtype, size, jit):
    gv = wnjax.WeightNorm(g=jnp.ones((1, 2)), v=jnp.full((16, 2), size, dtype))
    pull = jax.jit(jax.vjp, static_argnums=0) if jit else jax.vjp
    w, pullback = pull(wnjax.fold, gv)
    (grad,) = pullback(jnp.full((16, 2), 1e3, dtype))
    for x in (w, *grad):
        np.testing.assert_array_equal(np.asarray(x, np.float32), 0)
