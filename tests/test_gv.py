"""The arithmetic of a (g, v) leaf: the paper's formulas, derivatives, extremes, cost in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wnjax

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {"dense": ((6, 5), -1), "conv": ((3, 3, 2, 4), -1), "heads": ((4, 2, 3), (-2, -1))}


@st.composite
def normalized_params(draw):
    """A float64 (g, v) leaf of numpy arrays: any sign of g, ‖v‖ from about 1e-6 to 1e6."""
    shape, feature_axes = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    features = {axis % len(shape) for axis in np.atleast_1d(feature_axes)}
    gain_shape = [size if axis in features else 1 for axis, size in enumerate(shape)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    v = rng.normal(size=shape) * 10.0 ** draw(st.integers(-6, 6))
    return wnjax.WeightNorm(rng.normal(size=gain_shape), v)


def fan_in(gv):
    return tuple(i for i, size in enumerate(gv.g.shape) if size != gv.v.shape[i])


def random_like(tree, seed=2**33):  # a seed that (g, v) leaves never draws
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@given(gv=normalized_params())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_gradients_are_the_papers(gv):
    with jax.enable_x64(True):
        w, pullback = jax.vjp(wnjax.fold, gv)
        grad_w = random_like(w)
        (grad,) = pullback(grad_w)

    g, v, axes, grad_w = np.asarray(gv.g), np.asarray(gv.v), fan_in(gv), np.asarray(grad_w)
    norm = np.sqrt((v**2).sum(axes, keepdims=True))
    grad_g = (grad_w * v).sum(axes, keepdims=True) / norm
    grad_v = g / norm * grad_w - g * grad_g / norm**2 * v
    np.testing.assert_allclose(w, g * v / norm, rtol=1e-13)
    np.testing.assert_allclose(grad.g, grad_g, rtol=1e-10, atol=1e-13)
    unprojected = np.abs(g / norm * grad_w).max()
    np.testing.assert_allclose(grad.v, grad_v, rtol=0, atol=1e-13 * unprojected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@given(gv=normalized_params())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_gradient_of_v_is_orthogonal_to_v(gv, dtype):
    with jax.enable_x64(True):
        gv = jax.tree.map(lambda x: jnp.asarray(x, dtype), gv)
        w, pullback = jax.vjp(wnjax.fold, gv)
        (grad,) = pullback(random_like(w))
        axes, eps = fan_in(gv), float(jnp.finfo(dtype).eps)
        v, grad_v = np.asarray(gv.v, np.float64), np.asarray(grad.v, np.float64)
    along = (v * grad_v).sum(axes)
    lengths = np.sqrt((v**2).sum(axes) * (grad_v**2).sum(axes))
    # Where the projected gradient is itself tiny, rounding of the unprojected one shows.
    unprojected = np.abs(np.asarray(gv.g, np.float64)).reshape(along.shape) * np.sqrt(v.size)
    assert (np.abs(along) <= 8 * eps * (lengths + unprojected)).all()


@given(gv=normalized_params(), factor=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_length_of_v_scales_only_its_gradient(gv, factor):
    with jax.enable_x64(True):
        longer = wnjax.WeightNorm(gv.g, gv.v * factor)
        w, pullback = jax.vjp(wnjax.fold, gv)
        longer_w, longer_pullback = jax.vjp(wnjax.fold, longer)
        grad_w = random_like(w)
        (grad,), (longer_grad,) = pullback(grad_w), longer_pullback(grad_w)
    np.testing.assert_allclose(longer_w, w, rtol=1e-12)
    np.testing.assert_allclose(longer_grad.g, grad.g, rtol=1e-9, atol=1e-12)
    scale = np.abs(grad.v).max()
    np.testing.assert_allclose(
        factor * np.asarray(longer_grad.v), grad.v, rtol=0, atol=1e-12 * scale
    )


@pytest.mark.parametrize("kind", [wnjax.WeightNorm, wnjax.LogWeightNorm])
@pytest.mark.parametrize("name", SHAPES)
def test_hessian_vector_product_equals_finite_differences(name, kind, x64):
    """Forward over reverse, as physics-informed users take it."""
    shape, feature_axes = SHAPES[name]
    rng = np.random.default_rng(0)
    gv = wnjax.weight_norm({"w": jnp.asarray(rng.normal(size=shape))}, {"w": feature_axes})["w"]
    gv = kind(*random_like(gv, seed=1))
    a = jnp.asarray(rng.normal(size=shape))

    gradient = jax.jit(jax.grad(lambda gv: jnp.sum(jnp.tanh(a * wnjax.fold(gv)))))
    tangent = random_like(gv, seed=2)
    hvp = jax.jit(lambda n, t: jax.jvp(gradient, (n,), (t,))[1])(gv, tangent)

    step = 1e-5
    ahead, behind = (
        gradient(jax.tree.map(lambda x, t, sign=sign: x + sign * step * t, gv, tangent))
        for sign in (1, -1)
    )
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), hvp, difference
    )


@pytest.mark.parametrize("order", [("rev", "rev"), ("fwd", "fwd"), ("rev", "fwd")])
def test_second_derivatives_agree_in_every_mode(order, x64):
    gv = random_like(wnjax.WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2))))
    jacobian = {"rev": jax.jacrev, "fwd": jax.jacfwd}

    def f(gv):
        return jnp.sum(jnp.sin(jax.checkpoint(wnjax.fold)(gv)))

    outer, inner = (jacobian[mode] for mode in order)
    actual, expected = outer(inner(f))(gv), jax.hessian(f)(gv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual, expected)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("length", [1e-15, 1e-13, 1e-6, 1.0, 1e6, 1e13, 1e18])
def test_all_lengths_of_v_in_range_have_right_derivatives(length, jit):
    """Float32, whose squares span 1e-38 to 3e38, against float64."""
    rng = np.random.default_rng(0)
    v, g, grad_w = rng.normal(size=(8, 3)), rng.normal(size=(1, 3)), rng.normal(size=(8, 3))
    v *= length / np.linalg.norm(v, axis=0)
    pull = jax.jit(lambda gv, ct: jax.vjp(wnjax.fold, gv)[1](ct)[0])

    def gradients(dtype):
        cast = [jnp.asarray(x, dtype) for x in (g, v, grad_w)]
        if jit:
            return pull(wnjax.WeightNorm(*cast[:2]), cast[2])
        return jax.vjp(wnjax.fold, wnjax.WeightNorm(*cast[:2]))[1](cast[2])[0]

    actual = gradients(jnp.float32)
    with jax.enable_x64(True):
        expected = gradients(jnp.float64)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-6 * np.abs(e).max())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_broken_weights_stay_visible(bad):
    gv = wnjax.WeightNorm(g=jnp.ones((1, 2)), v=jnp.array([[bad, 1.0], [1.0, 0.0]]))
    w = wnjax.fold(gv)
    assert jnp.isnan(w[0, 0])
    np.testing.assert_array_equal(w[:, 1], [1, 0])
    normalized = wnjax.fold(wnjax.weight_norm({"kernel": gv.v}))["kernel"]
    assert not jnp.isfinite(normalized[0, 0])
    np.testing.assert_array_equal(normalized[:, 1], [1, 0])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-18, 1e21, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_out_of_range_are_kept(dtype, size, jit):
    """‖w‖² under- or overflows; g is still ‖w‖, and v is scaled into range."""
    w = jnp.array([[3 * size, 1.0], [-4 * size, 2.0]], dtype)
    transform = jax.jit(wnjax.weight_norm) if jit else wnjax.weight_norm
    gv = transform({"kernel": w})["kernel"]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gv.g[0, 0], 5 * size, rtol=2 * eps)
    np.testing.assert_array_equal(gv.v[:, 1], w[:, 1])
    folded, w = (np.asarray(x, np.float64) for x in (wnjax.fold(gv), w))
    np.testing.assert_allclose(folded, w, rtol=2 * eps)


@pytest.mark.parametrize(
    ("dtype", "value", "size", "norm"),
    [
        (jnp.float16, 300, 4, 600),  # the sum of squares overflows float16
        (jnp.float16, 300, 65536, 76800),  # and so does the norm itself
        (jnp.float16, 1e-4, 4, 2e-4),  # the squares underflow float16
        (jnp.bfloat16, 1, 65536, 256),  # a sum in bfloat16 stops growing at 256
    ],
)
def test_norms_of_low_precision_weights_are_float32(dtype, value, size, norm):
    w = jnp.full((size, 1), value, dtype)
    gv = wnjax.weight_norm({"kernel": w})["kernel"]
    assert (gv.g.dtype, gv.v.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(gv.g, norm, rtol=2e-3 if value == 1e-4 else 1e-6)
    np.testing.assert_array_equal(wnjax.fold(gv), w)


ROUNDED = pytest.mark.parametrize("use", [wnjax.fold, wnjax.wrap(lambda params: params)])


@ROUNDED
def test_gain_of_lower_precision_is_accepted_with_a_warning(use):
    """As after casting a whole tree to bfloat16."""
    v = jnp.array([[3.0], [4.0]], jnp.bfloat16)
    gv = wnjax.WeightNorm(g=jnp.full((1, 1), 10, jnp.bfloat16), v=v)
    with pytest.warns(UserWarning, match=r"rounding has changed .*\n  dense/kernel: bfloat16"):
        w = use({"dense": {"kernel": gv}})["dense"]["kernel"]
    assert w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(w, [[6.0], [8.0]])


@pytest.mark.parametrize("how", ["fold first", "inside", "all but gains"])
def test_casting_without_rounding_gains(how):
    """What the warning and the docs recommend: lengths are off by the rounding of w alone."""
    tree = {"kernel": jax.random.normal(jax.random.key(0), (512, 64))}
    normalized_params = wnjax.weight_norm(tree)

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    if how == "fold first":
        low = cast(wnjax.fold(normalized_params))
    elif how == "inside":
        low = wnjax.wrap(cast)(normalized_params)
    else:
        labels = wnjax.labels(normalized_params)
        low = wnjax.fold(
            jax.tree.map(
                lambda x, y, of: x if of == "g" else y,
                normalized_params,
                cast(normalized_params),
                labels,
            )
        )
    with pytest.warns(UserWarning, match="rounding has changed"):
        rounded = wnjax.fold(cast(normalized_params))

    def error(low):
        lengths = np.linalg.norm(np.asarray(low["kernel"], np.float64), axis=0)
        return np.abs(lengths / np.linalg.norm(tree["kernel"], axis=0) - 1).max()

    assert error(low) < 4e-4  # 2⁻⁸/√512, of 512 rounded numbers, several times over
    assert error(rounded) > 1e-3


def test_bytes_of_forward_and_backward():
    """XLA's own count, in units of N = the bytes of v.

    Eight array passes are the least: v is read for the norm; v read, w written; ∇w and v
    read for their product; both read again and ∇v written. A naive division stores v/‖v‖.
    """
    v = jax.random.normal(jax.random.key(0), (2048, 2048))
    gv = wnjax.weight_norm({"kernel": v})["kernel"]

    def passes(fold):
        def forward_and_backward(gv, grad_w):
            w, pullback = jax.vjp(fold, gv)
            return w, pullback(grad_w)

        cost = jax.jit(forward_and_backward).lower(gv, v).compile().cost_analysis()
        return cost["bytes accessed"] / v.nbytes

    def naive(gv):
        return gv.g * gv.v / jnp.linalg.norm(gv.v, axis=0, keepdims=True)

    assert passes(wnjax.fold) <= 8.5
    assert passes(naive) >= 13.5
