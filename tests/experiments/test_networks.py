"""The networks of the paper: their likelihoods and divergences by numbers, and their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import wnjax
from experiments.networks.draw import Draw, filters
from experiments.networks.gaussian import (
    Gaussian,
    bernoulli_nats,
    divergence,
    gaussian,
    logistic_nats,
)
from experiments.networks.layers import ActivationNorm
from experiments.networks.transformer import Transformer
from experiments.networks.vae import BinaryVAE, HierarchicalVAE

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNGS = {name: jax.random.key(i) for i, name in enumerate(("params", "latent", "binarization"))}


def test_divergence_against_an_integral():
    q, p = (
        Gaussian(jnp.float32(0.3), jnp.float32(-0.5)),
        Gaussian(jnp.float32(-1), jnp.float32(0.2)),
    )
    x, dx = np.linspace(-10, 10, 200_001, retstep=True)
    density = stats.norm(q.mean, np.exp(q.log_std))
    other = stats.norm(p.mean, np.exp(p.log_std))
    integral = np.sum(density.pdf(x) * (density.logpdf(x) - other.logpdf(x))) * dx
    np.testing.assert_allclose(divergence(q, p), integral, rtol=1e-4)
    assert divergence(q, q) == 0


def test_samples_have_the_moments():
    q = gaussian(jnp.tile(jnp.array([[1.0, jnp.log(0.5)]], jnp.float32), (20_000, 1)))
    x = np.asarray(q.sample(jax.random.key(0)))
    np.testing.assert_allclose([x.mean(), x.std()], [1, 0.5], rtol=0.02)


def test_bernoulli_against_scipy():
    logits = jnp.array([[0.3, -2.0, 40.0]], jnp.float32)
    pixels = jnp.array([[True, False, False]])
    p = 1 / (1 + np.exp(-np.float64(logits)))
    expected = -np.log(p[0, 0]) - np.log(1 - p[0, 1]) + 40
    np.testing.assert_allclose(bernoulli_nats(logits, pixels), [expected], rtol=1e-6)


@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0])
def test_the_256_levels_share_a_probability_of_one(log_scale):
    levels = jnp.arange(256, dtype=jnp.float32)[:, None] / 255
    for mean in (0.0, 0.4, 1.3):
        nats = logistic_nats(jnp.full((256, 1), mean), jnp.float32(log_scale), levels)
        np.testing.assert_allclose(jnp.exp(-nats).sum(), 1, rtol=2e-3)
        assert jnp.isfinite(
            jax.grad(
                lambda m, s=log_scale: logistic_nats(
                    jnp.full((256, 1), m), jnp.float32(s), levels
                ).sum()
            )(mean)
        )


def test_logistic_against_scipy():
    mean, scale, level = 0.45, 0.05, 120 / 255
    edges = stats.logistic(mean, scale).cdf([level - 0.5 / 255, level + 0.5 / 255])
    nats = logistic_nats(
        jnp.full((1, 1), mean), jnp.log(jnp.float32(scale)), jnp.full((1, 1), level)
    )
    np.testing.assert_allclose(nats, [-np.log(edges[1] - edges[0])], rtol=1e-4)


def test_filters_sum_to_one_and_see_the_middle():
    # Center 0, variance 1, stride (28 - 1) / (2 - 1) times exp(-2), intensity 2.
    parameters = jnp.array([[0.0, 0.0, 0.0, -2.0, np.log(2.0)]], jnp.float32)
    bank = filters(parameters, 28, 28, 2)
    np.testing.assert_allclose(bank.rows.sum(-1), 1, rtol=1e-5)
    places = 13.5 + 27 * np.exp(-2) * np.array([-0.5, 0.5])
    np.testing.assert_allclose(
        (np.asarray(bank.rows[0]) * np.arange(28)).sum(-1), places, atol=0.05
    )
    ramp = jnp.tile(jnp.arange(28, dtype=jnp.float32), (1, 28, 1))  # brighter rightwards
    np.testing.assert_allclose(bank.read(ramp)[0], 2 * places[[0, 1, 0, 1]], rtol=1e-2)
    written = bank.write(jnp.ones((1, 4), jnp.float32))
    np.testing.assert_allclose(written.sum(), 4 / 2, rtol=1e-5)


def test_a_filter_beside_the_image_is_finite():
    parameters = jnp.array([[50.0, -50.0, -8.0, 3.0, 0.0]], jnp.float32)
    values, grads = jax.value_and_grad(lambda p: filters(p, 28, 28, 5).rows.sum())(parameters)
    np.testing.assert_allclose(values, 5, rtol=1e-5)
    assert jnp.isfinite(grads).all()


NETWORKS = {
    "binary": (BinaryVAE((28, 28, 1), (2, 3), 1, 8, 2), (28, 28, 1)),
    "hierarchical": (HierarchicalVAE((8, 8, 3), 4, 2, levels=2, units=2), (8, 8, 3)),
    "draw": (Draw((28, 28, 1), 3, 8, 2, 2, 3), (28, 28, 1)),
}


def numbers(network, images):
    """Parameters of small random numbers: initializers take long to compile."""
    shapes = jax.eval_shape(lambda: network.init(RNGS, images, train=True))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.1 * random.standard_normal(x.shape, np.float32), shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_generative_networks(name):
    """Terms are per example, every kernel is of neurons and has a gradient, pictures fit."""
    network, shape = NETWORKS[name]
    images = jax.random.randint(jax.random.key(5), (4, *shape), 0, 256).astype(jnp.float32) / 255
    params = numbers(network, images)

    def terms(params, images):
        rngs = {"latent": RNGS["latent"], "binarization": RNGS["binarization"]}
        return network.apply({"params": params}, images, train=True, rngs=rngs)

    found = jax.eval_shape(terms, params, images)
    assert {key: x.shape for key, x in found.items()} == {"reconstruction": (4,), "kl": (4,)}
    loss = jax.grad(lambda p: sum(x.sum() for x in terms(p, images).values()))
    grads = jax.jit(loss)(params)
    axes = wnjax.infer_axes(terms)(params, images)
    pairs = jax.tree_util.tree_leaves_with_path(grads)
    kernels = [(p, g) for p, g in pairs if p[-1].key == "kernel"]
    assert kernels
    for path, grad in kernels:
        assert jnp.isfinite(grad).all(), path
        assert (grad != 0).any(), path
    neurons = [path for path, one in _decisions(axes) if isinstance(one, wnjax.Weight)]
    assert len(neurons) == len(kernels)

    def draw(method, argument):
        """The shape and dtype of pictures of the network that computes in bfloat16."""

        def apply(params):
            half = network.clone(dtype=jnp.bfloat16)
            return half.apply({"params": params}, argument, method=method, rngs=RNGS)

        pictures = jax.eval_shape(apply, params)
        return pictures.shape, pictures.dtype

    steps = (3,) if name == "draw" else ()
    assert draw("sample", 5) == ((*steps, 5, *shape), jnp.float32)
    assert draw("reconstruct", images) == ((*steps, 4, *shape), jnp.float32)


def _decisions(axes):
    kinds = wnjax.Weight, wnjax.NotWeight
    return jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, kinds))


def test_the_divergence_is_zero_where_the_posterior_is_the_prior():
    network, shape = NETWORKS["hierarchical"]
    images = jnp.zeros((2, *shape), jnp.float32)
    params = numbers(network, images)
    for name, unit in params.items():
        if name.startswith("stack"):
            for head in ("above", "below", "prior"):
                unit[head] = jax.tree.map(jnp.zeros_like, unit[head])
    terms = network.apply({"params": params}, images, train=True, rngs=RNGS)
    np.testing.assert_array_equal(terms["kl"], 0)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_transformer_sees_only_what_is_before(layer_norm):
    network = Transformer(1, 8, 2, 16, 32, 6, layer_norm=layer_norm, norm=ActivationNorm.NONE)
    tokens = jax.random.randint(jax.random.key(0), (1, 6), 0, 32)
    variables = {"params": numbers(network, tokens)}
    out = network.apply(variables, tokens, train=False)
    changed = network.apply(variables, tokens.at[0, 3].set(31 - tokens[0, 3]), train=False)
    np.testing.assert_allclose(out[0, :3], changed[0, :3], atol=1e-6)
    assert (abs(out[0, 3:] - changed[0, 3:]).max(-1) > 1e-6).all()
    assert any("LayerNorm" in name for name in variables["params"]) == layer_norm


def test_networks_compute_in_bfloat16():
    network = Transformer(1, 8, 2, 16, 32, 6, dtype=jnp.bfloat16)
    tokens = jnp.zeros((1, 6), jnp.int32)
    variables = {"params": numbers(network, tokens)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert network.apply(variables, tokens, train=False).dtype == jnp.bfloat16
