"""What `wrap` costs a training step, by XLA's own counts, which are deterministic.

They are of XLA's program, and the same whether LLVM optimizes it or not.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import wnjax
from experiments.networks.classifiers import MLP
from experiments.networks.transformer import Transformer
from wnjax._rewriting import xla


def compiled_step(fn, params, inputs, labels):
    """XLA's bytes accessed and temporary memory of a training step with Adam."""
    optimizer = optax.adam(1e-3)

    def step(params, state):
        def loss(params):
            logits = fn(params, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = jax.eval_shape(optimizer.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled.cost_analysis()["bytes accessed"], memory


COSTS = {  # XLA's bytes and temporary memory, at most, in those of the plain step
    ("mlp", 8): (1.12, 1.0),
    ("mlp", 64): (1.12, 1.0),
    ("mlp", 512): (1.18, 1.01),
    ("transformer", 2): (1.05, 1.0),
    ("transformer", 8): (1.08, 1.03),
}


@pytest.mark.parametrize(("network", "batch"), COSTS)
def test_cost(network, batch, monkeypatch):
    """Against the plain step; and never more bytes than with the scale on the weights."""
    if network == "mlp":
        model, inputs = MLP(), jax.ShapeDtypeStruct((batch, 784), jnp.float32)
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    else:
        model, inputs = Transformer(), jax.ShapeDtypeStruct((batch, 64), jnp.int32)
        labels = inputs
    inputs, labels = (jnp.zeros(x.shape, x.dtype) for x in (inputs, labels))

    def fn(params, x):
        return model.apply({"params": params}, x, train=True)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(model.init, jax.random.key(0), inputs, train=False)["params"]
        axes = wnjax.infer_axes(fn)(params, inputs)
        tree = jax.eval_shape(lambda p: wnjax.weight_norm(p, axes), params)
    plain = compiled_step(fn, params, inputs, labels)
    folded = compiled_step(lambda t, x: fn(wnjax.fold(t), x), tree, inputs, labels)
    single = compiled_step(wnjax.wrap(fn), tree, inputs, labels)
    monkeypatch.setattr(xla, "_is_on_one_device", lambda _: False)
    several = compiled_step(wnjax.wrap(fn), tree, inputs, labels)
    bytes_, memory = (one / base for one, base in zip(single, plain, strict=True))
    assert bytes_ <= COSTS[network, batch][0]
    assert memory <= COSTS[network, batch][1]
    assert single[0] <= several[0] <= folded[0]
    assert several[0] / plain[0] <= (1.26 if batch == 512 else 1.22)
