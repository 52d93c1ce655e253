"""Programs as users write them, from the README and the docs: `make types` checks their types.

They are without annotations where those of the docs are, and with them where a user's would be.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import export

import wnjax


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(2)(x))
        return nn.Dense(1)(x)


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 2, rngs=rngs)
        self.last = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x)))


model = Linen()
x = jax.random.normal(jax.random.key(0), (128, 3))
y = jnp.ones((128, 1))


def new_params():
    return model.init(jax.random.key(0), x)["params"]


def fn(params, x):
    return model.apply({"params": params}, x)


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"]) @ params["last"]


MLP_PARAMS = {"first": jnp.ones((3, 2)), "last": jnp.ones((2, 1))}


@pytest.fixture(autouse=True)
def nothing_is_promoted():
    """But here dtypes are promoted, as they are for users."""


def test_explicit_form():
    """From the README and docs/quickstart_linen.md."""
    params, optimizer = new_params(), optax.adam(1e-2)

    def loss(fn, params):
        return jnp.mean((fn(params, x) - y) ** 2)

    @partial(jax.jit, static_argnums=0)
    def step(fn, params, state):
        grads = jax.grad(loss, argnums=1)(fn, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    wn_params = wnjax.weight_norm(params, axes=wnjax.infer_axes(fn)(params, x))
    wn_fn = wnjax.wrap(fn)
    print(wnjax.summary(wn_params))
    state = optimizer.init(wn_params)
    for _ in range(2):
        wn_params, state = step(wn_fn, wn_params, state)
    weights = wnjax.fold(wn_params)
    assert weights["Dense_0"]["kernel"].shape == wn_params["Dense_0"]["kernel"].v.shape


def test_train_state():
    """From docs/quickstart_linen.md."""
    params = new_params()
    optimizer = wnjax.weight_normalized(optax.adam(1e-2), wnjax.infer_axes(fn)(params, x))
    train_state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    @jax.jit
    def train_step(train_state, x, y):
        def loss(params):
            return jnp.mean((train_state.apply_fn({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(train_state.params)
        return train_state.apply_gradients(grads=grads), value

    train_state, value = train_step(train_state, x, y)
    assert wnjax.fold(train_state.params)["Dense_0"]["kernel"].shape == (3, 2)
    assert value >= 0


def test_linen_modules():
    """From the README, docs/quickstart_linen.md and docs/recipes.md."""

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = wnjax.linen.WeightNorm(nn.Dense(2, use_bias=False))(x)
            x = wnjax.linen.MeanOnlyBatchNorm(use_running_average=not train)(x)
            return wnjax.linen.WeightNorm(nn.Dense(1), axes={"kernel": -1})(nn.relu(x))

    normalized = Normalized()
    variables = normalized.init(jax.random.key(0), x, train=False)
    print(wnjax.summary(variables["params"]))
    out, new = normalized.apply(variables, x, train=True, mutable=["batch_stats"])
    assert (out.shape, list(new)) == ((128, 1), ["batch_stats"])


def test_nnx_modules():
    """From the README and docs/quickstart_nnx.md."""

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return value

    model = wnjax.nnx.WeightNorm(NNX(nnx.Rngs(0)))
    model(x)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    assert step(model, optimizer, x, y) >= 0
    assert nnx.state(model.folded(), nnx.Param)["last"]["kernel"][...].shape == (2, 1)
    assert model.last.kernel.g.shape == (1, 1)
    assert abs(model.folded()(x) - model(x)).max() < 1e-5
    assert wnjax.norms(model.normalized())["last/kernel"]["v"].shape == (1, 1)


def test_nnx_split_and_merge():
    """From docs/quickstart_nnx.md."""
    graph, params, *rest = nnx.split(NNX(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, *rest)(x)

    normalized_params = wnjax.weight_norm(params, wnjax.infer_axes(fn)(params, x))
    normalized_params = wnjax.data_init(fn)(normalized_params, x)
    out: jax.Array = wnjax.wrap(fn)(normalized_params, x)
    trained = nnx.merge(graph, wnjax.fold(normalized_params), *rest)
    assert abs(trained(x) - out).max() < 1e-5


def test_weight_normalized():
    """From the README and docs/optax.md."""
    params = MLP_PARAMS
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        wnjax.weight_normalized(optax.adam(1e-2), {".*": -1}, remainder=False),
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean((mlp(params, x) - y) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, optimizer.init(params))
    one: wnjax.WeightNormalizedState = optax.tree.get(state, "WeightNormalizedState")
    normalized_params = wnjax.inner_params(one, params)
    assert normalized_params["first"].g.shape == one.lengths["first"].shape == (1, 2)


def test_inner_params_of_a_state_as_optax_types_it():
    """From docs/optax.md."""
    schedule_free = optax.contrib.schedule_free_sgd(0.1)
    optimizer = wnjax.weight_normalized(schedule_free, {".*": -1})
    state = optimizer.init(MLP_PARAMS)
    normalized_params = wnjax.inner_params(state, MLP_PARAMS)
    assert isinstance(state, wnjax.WeightNormalizedState)
    evaluated = optax.contrib.schedule_free_eval_params(state.inner, normalized_params)
    assert jnp.allclose(wnjax.fold(evaluated["first"]), MLP_PARAMS["first"])


def test_data_init():
    """From docs/recipes.md."""
    params = new_params()
    params, report = wnjax.data_init(fn, std={"Dense_1/kernel": 0.5}, report=True)(params, x)
    print(wnjax.summary(report))
    again = jax.jit(wnjax.data_init(lambda params, x: fn(params, 2 * x)))(params, x)
    assert again["Dense_0"]["kernel"].shape == (3, 2)
    typed = {"first": jax.random.normal(jax.random.key(1), (3, 2)), "last": jnp.ones((2, 1))}
    bias_free = wnjax.data_init(mlp, mask=jnp.ones(128, bool))(typed, x)
    assert bias_free["first"].shape == (3, 2)


def test_data_initialized():
    """From docs/recipes.md."""
    params = new_params()
    inner = wnjax.weight_normalized(optax.adam(1e-2))
    optimizer = wnjax.data_initialized(inner, fn, std=0.5)
    updates, state = optimizer.update(params, optimizer.init(params), params, batch=x)
    assert isinstance(state, wnjax.DataInitializedState)
    assert state.initialized
    assert optax.apply_updates(params, updates)


def test_recipes():
    """From docs/recipes.md: frozen gains, forced norms."""
    params = wnjax.weight_norm(MLP_PARAMS, {".*": -1})
    adam = optax.adam(1e-2)
    freeze_g = optax.multi_transform(
        {"g": optax.set_to_zero(), "v": adam, "other": adam}, wnjax.labels
    )
    forced = optax.chain(freeze_g, wnjax.keep_norms())
    updates, _ = forced.update(params, forced.init(params), params)
    after = wnjax.norms(optax.apply_updates(params, updates))["first"]
    assert jnp.allclose(after["v"], wnjax.norms(params)["first"]["v"])
    means = {path: {k: float(a.mean()) for k, a in x.items()} for path, x in [("first", after)]}
    assert means["first"]["g"] > 0


def test_infer_axes():
    """From docs/axes.md; shapes for arrays, as in docs/sharding.md, where fn says arrays, too."""
    shapes = jax.eval_shape(lambda: MLP_PARAMS)
    batch = jax.ShapeDtypeStruct((128, 3), jnp.float32)
    axes = wnjax.infer_axes(mlp, overrides={"first": (1,), "last": None}, strict=True)(
        shapes, batch
    )
    refused = {path: what for path, what in axes.items() if isinstance(what, wnjax.NotWeight)}
    print(wnjax.summary(axes), refused["last"].reason)
    normalized_params = wnjax.weight_norm(MLP_PARAMS, axes)
    assert normalized_params["first"].g.shape == (1, 2)
    abstract = wnjax.weight_norm({"first": jax.ShapeDtypeStruct((3, 2), jnp.float32)}, axes)
    assert abstract["first"].v.shape == (3, 2)
    lambdas = wnjax.infer_axes(lambda params, x: fn(params, 2 * x))(new_params(), x)
    assert lambdas["Dense_0"]["kernel"].feature_axes == (1,)


def test_all_forms_of_axes():
    """From docs/axes.md."""

    def last(path: str, leaf: Any) -> int | None:
        return -1 if leaf.ndim > 1 else None

    patterns = {".*first": (-1,), ".*": None}
    decisions = {"first": wnjax.Weight(-1), "last": wnjax.NotWeight("not today")}
    forms: list[wnjax.Axes] = [
        patterns,
        decisions,
        last,
        lambda path, leaf: -1 if path == "first" else None,
        {"first": -1, "last": None},
    ]
    for axes in forms:
        assert wnjax.weight_norm(MLP_PARAMS, axes)["first"].g.shape == (1, 2)

    def train(params: dict[str, jax.Array], axes: wnjax.Axes = None) -> dict[str, jax.Array]:
        return wnjax.fold(wnjax.weight_norm(params, axes=axes, log_scale=True))

    assert train(MLP_PARAMS, patterns)["first"].shape == (3, 2)
    assert train(MLP_PARAMS, axes=lambda path, _: (1,))["first"].shape == (3, 2)


def test_containers():
    """Trees of the user's own types, and such as jax.tree gives."""

    class Layer(NamedTuple):
        kernel: Any
        bias: Any

    @dataclasses.dataclass(frozen=True)
    class Model:
        layers: list[Layer]

        def __call__(self, x):
            for layer in self.layers:
                x = x @ layer.kernel + layer.bias
            return x

    jax.tree_util.register_dataclass(Model, ["layers"], [])
    model = Model([Layer(jnp.ones((3, 2)), jnp.zeros(2))])
    normalized_params = wnjax.weight_norm(model)
    assert normalized_params.layers[0].kernel.g.shape == (1, 2)
    assert wnjax.fold(normalized_params)(x).shape == (128, 2)
    assert wnjax.wrap(lambda model, x: model(x))(normalized_params, x).shape == (128, 2)
    assert wnjax.data_init(Model.__call__)(normalized_params, x).layers[0].kernel.v.shape == (3, 2)
    listed = wnjax.weight_norm([{"kernel": jnp.ones((3, 2))}])
    assert listed[0]["kernel"].g.shape == (1, 2)
    alone = wnjax.weight_norm(jnp.ones((3, 2)), lambda path, leaf: -1)
    assert alone.g.shape == (1, 2)
    assert wnjax.fold(alone).mean() == wnjax.fold(wnjax.WeightNorm(*alone)).mean()


def test_leaves():
    """From docs/faq.md."""
    params = wnjax.weight_norm(MLP_PARAMS, {".*": -1})
    leaves = jax.tree.leaves(params, is_leaf=wnjax.is_weight_norm)

    def length(leaf: object) -> float:
        if wnjax.is_weight_norm(leaf):
            return float(abs(wnjax.fold(leaf)).sum() + leaf.v.sum())
        return 0.0

    kernel = params["first"]
    assert sum(map(length, leaves)) > 0
    assert isinstance(kernel, wnjax.WeightNorm)
    assert wnjax.fold(kernel._replace(g=2 * kernel.g)).shape == kernel.v.shape


def test_transformations_of_wrapped_functions():
    """From the README and docs/switching.md."""
    params = wnjax.weight_norm(MLP_PARAMS, {".*": -1})

    @wnjax.wrap
    def loss(params, x, *, scale: float = 1.0) -> jax.Array:
        return scale * jnp.mean(mlp(params, x) ** 2)

    assert jax.grad(loss)(params, x, scale=2.0)["first"].g.shape == (1, 2)
    assert jax.jit(wnjax.wrap(mlp))(params, x).shape == (128, 1)
    assert jax.jit(wnjax.wrap(lambda params, x: x @ params["first"]))(params, x).shape == (128, 2)
    assert jax.vmap(wnjax.wrap(mlp), in_axes=(None, 0))(params, x[:, None]).shape == (128, 1, 1)
    assert jax.eval_shape(wnjax.wrap(mlp), params, x).shape == (128, 1)
    assert wnjax.wrap(mlp)(params=params, x=x).shape == (128, 1)


def test_export():
    """From docs/serving.md."""
    normalized_params = wnjax.weight_norm(MLP_PARAMS, {".*": -1})
    batch = export.symbolic_shape("batch, 3")
    sizes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), normalized_params)
    wrapped = jax.jit(wnjax.wrap(mlp))
    program = export.export(wrapped)(sizes, jax.ShapeDtypeStruct(batch, x.dtype))
    again = export.deserialize(program.serialize())
    assert jnp.allclose(again.call(normalized_params, x), mlp(wnjax.fold(normalized_params), x))


def test_checkpoints():
    """From docs/checkpoints.md."""
    normalized_params = wnjax.weight_norm(MLP_PARAMS, {".*": -1})
    data = serialization.to_bytes(normalized_params)
    target = jax.tree.map(jnp.zeros_like, normalized_params)
    assert serialization.from_bytes(target, data)["first"].g.shape == (1, 2)
    restored = wnjax.convert.from_dicts(serialization.msgpack_restore(data))
    assert restored["first"].g.shape == (1, 2)


def test_pytorch():
    """From docs/pytorch.md."""
    rng = np.random.default_rng(0)
    state_dict = {  # what torch.load(path, weights_only=True) returns
        "Dense_0.weight_g": rng.normal(size=(2, 1)).astype("float32"),
        "Dense_0.weight_v": rng.normal(size=(2, 3)).astype("float32"),
        "Dense_0.bias": np.zeros(2, "float32"),
        "head.weight": rng.normal(size=(1, 2)).astype("float32"),
        "head.bias": np.zeros(1, "float32"),
    }
    template = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    names = {r"Dense_1/(.*)": r"head.\1"}
    layouts = wnjax.pytorch.infer_layouts(fn)(template, x)
    params = wnjax.pytorch.from_state_dict(state_dict, template, names, layouts=layouts)
    assert params["Dense_0"]["kernel"].v.shape == (3, 2)
    back = wnjax.pytorch.to_state_dict(params, names, style="weight_g", like=state_dict)
    assert {name: a.shape for name, a in back.items()} == {
        name: a.shape for name, a in state_dict.items()
    }
    parts: wnjax.pytorch.Names = {**wnjax.pytorch.lstm("cell", "encoder"), "out/(.*)": r"head.\1"}
    assert isinstance(parts, Mapping)


def test_convert():
    """From docs/switching.md."""

    class Old(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(2))(x)

    params = wnjax.convert.from_linen(Old().init(jax.random.key(1), x)["params"])
    assert params["Dense_0"]["kernel"].g.shape == (1, 2)
    old = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert wnjax.convert.from_nnx(old).kernel.g.shape == (1, 4)
    linear = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
    new = wnjax.convert.from_equinox(linear)
    assert new.weight.g.shape == (4, 1)
    assert jax.vmap(wnjax.fold(new))(x).shape == (128, 4)
