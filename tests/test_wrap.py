"""`wrap(fn)(tree)` against `fn(fold(tree))`, and what it costs."""

import dataclasses

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.extend import core
from jax.interpreters import ad, mlir

import wnjax
from tests import toys, traced_layers, traced_layers_flax, traced_layers_nested, traced_models
from tests.accelerators import also_on_accelerators
from wnjax._rewriting import xla
from wnjax._transforms import wrap as wrapping

LAYERS = traced_layers.CASES | traced_layers_flax.CASES | traced_layers_nested.CASES
LOW_PRECISION = {"bfloat16_compute", "dense_bfloat16"}


def normalized(fn, params, *args):
    """A tree with (g, v) leaves off their start, where g is not ‖v‖; None if there is no weight."""
    axes = wnjax.infer_axes(fn)(params, *args)
    if not any(isinstance(x, wnjax.Weight) for x in jax.tree.leaves(axes)):
        return None
    change = {"g": lambda g: 0.7 * g, "v": lambda v: 1.9 * v, "other": lambda x: x}
    tree = wnjax.weight_norm(params, axes)
    return jax.tree.map(lambda label, x: change[label](x), wnjax.labels(tree), tree)


def loss(fn, args):
    def total(tree):
        outs = [
            x for x in jax.tree.leaves(fn(tree, *args)) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        wide = jnp.result_type(jnp.float32, *{x.dtype for x in outs})
        return sum(jnp.sum(jnp.sin(x.astype(wide))) for x in outs)

    return total


def check(fn, params, args, tolerance):
    """Loss and gradients with wrap and with fold, relative to the largest gradient of a leaf."""
    tree = normalized(fn, params, *args)
    if tree is None:
        return

    def both(tree):
        folded = loss(lambda t, *args: fn(wnjax.fold(t), *args), args)
        wrapped = loss(wnjax.wrap(fn), args)
        grad = [jax.value_and_grad(f, allow_int=True) for f in (wrapped, folded)]
        return [f(tree) for f in grad]

    with jax.numpy_dtype_promotion("standard"):
        actual, expected = jax.jit(both)(tree)
    pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    pairs = [(x, y) for x, y in pairs if x.dtype != jax.dtypes.float0]
    largest = max(np.max(abs(np.asarray(y, np.float64)), initial=0) for _, y in pairs)
    for x, y in pairs:
        scale = max(np.max(abs(np.asarray(y, np.float64)), initial=0), 1e-3 * largest)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


@pytest.fixture
def always_on_outputs(monkeypatch):
    """Scales ride wherever they can, also where that costs more."""
    monkeypatch.setattr(wrapping, "scales_output", lambda *_: True)


@pytest.fixture(params=[1, 8])
def devices(request, monkeypatch):
    """On a single device, XLA is told an order of derivatives."""
    monkeypatch.setattr(xla, "_is_on_one_device", lambda _: request.param == 1)


@pytest.mark.usefixtures("always_on_outputs")
@pytest.mark.filterwarnings("ignore:.*such as a mask")
@pytest.mark.parametrize(
    "name",
    also_on_accelerators(
        [name for name in LAYERS if not name.startswith("while_loop")],
        [
            *("two_layers", "conv_2d", "conv_transpose_2d", "attention_self", "stack_remat"),
            *("lstm", "moe_ragged_dot", "vmap_over_weights_bias", "bfloat16_compute"),
        ],
    ),
)
def test_layers(name):
    fn, params, args = LAYERS[name].build()
    if name in LOW_PRECISION:
        check(fn, params, args, 5e-2)
    elif name in traced_layers_flax.CASES:  # float32 is written into some of these
        check(fn, params, args, 5e-4)
    else:
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            check(fn, *toys.in_float64((params, args)), 1e-10)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("while_loop")])
def test_loops_without_a_gradient(name):
    fn, params, args = LAYERS[name].build()
    tree = normalized(fn, params, *args)
    actual, expected = wnjax.wrap(fn)(tree, *args), fn(wnjax.fold(tree), *args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", traced_models.MODELS)
def test_models(name):
    fn, params, args = traced_models.MODELS[name].build(False)
    check(fn, params, args, 2e-3)


def stack(params, x):
    """The second kernel in a scan of rematerialized layers, the first one before it."""

    @jax.checkpoint
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x = x @ params["first"]["kernel"]
    return jax.lax.scan(layer, x, params["second"]["kernel"])[0]


def stack_params():
    keys = jax.random.split(jax.random.key(0))
    shapes = {"first": (3, 8), "second": (5, 8, 8)}
    return {
        name: {"kernel": jax.random.normal(key, shape, jnp.float64) / 2}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def double_mlp_params():
    return jax.tree.map(lambda x: x.astype(jnp.float64), toys.mlp_params())


FUNCTIONS = {"mlp": (toys.mlp, double_mlp_params), "scanned_stack": (stack, stack_params)}


@pytest.fixture(params=FUNCTIONS)
def case(request, x64, devices, always_on_outputs):
    """(fn, fn with wrap, fn with fold, tree, x) in float64."""
    fn, make = FUNCTIONS[request.param]
    x = jax.random.normal(jax.random.key(1), (4, 3), jnp.float64)
    tree = normalized(fn, make(), x)
    return wnjax.wrap(fn), lambda tree, x: fn(wnjax.fold(tree), x), tree, x


def test_forward_mode(case):
    *functions, tree, x = case
    tangents = jax.tree.map(jnp.cos, (tree, x))
    actual, expected = (
        jax.jit(jax.jvp, static_argnums=0)(f, (tree, x), tangents) for f in functions
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.accelerator
def test_hessian_vector_products(case):
    *functions, tree, x = case

    def product(f):
        def total(tree):
            return jnp.sum(jnp.sin(f(tree, x)))

        forward = jax.jvp(jax.grad(total), (tree,), (jax.tree.map(jnp.cos, tree),))[1]
        reverse = jax.grad(
            lambda t: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, jax.grad(total)(t), t))
        )
        return forward, reverse(tree)

    actual, expected = (jax.jit(product, static_argnums=0)(f) for f in functions)
    chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_vmap_over_examples_and_over_trees(case):
    wrapped, folded, tree, x = case
    trees = jax.tree.map(lambda a: jnp.stack([a, 2 * a + 1]), tree)

    def batched(f):
        examples = jax.vmap(jax.grad(lambda t, x: jnp.sum(jnp.sin(f(t, x)))), (None, 0))(tree, x)
        return examples, jax.vmap(f, (0, None))(trees, x)

    actual, expected = (jax.jit(batched, static_argnums=0)(f) for f in (wrapped, folded))
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_remat_and_scan_around_it(case):
    wrapped, folded, tree, x = case

    def total(f):
        def step(carry, _):
            return carry + jax.checkpoint(f)(tree, x + carry.mean()).mean(), None

        return jax.lax.scan(step, jnp.zeros(()), length=3)[0]

    actual, expected = (
        jax.jit(jax.value_and_grad(lambda tree, f=f: total(lambda t, x: f(tree, x))))(tree)
        for f in (wrapped, folded)
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_training_gives_the_same_losses_for_200_steps(name, x64, devices, always_on_outputs):
    fn, make = FUNCTIONS[name]
    x = jax.random.normal(jax.random.key(1), (16, 3), jnp.float64)
    y = jnp.sin(3 * x.sum(axis=1, keepdims=True))
    optimizer = optax.adam(1e-2)

    def losses(f):
        def step(carry, _):
            tree, state = carry
            value, grads = jax.value_and_grad(lambda t: jnp.mean((f(t, x) - y) ** 2))(tree)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state, tree)
            return (optax.apply_updates(tree, updates), state), value

        tree = wnjax.weight_norm(make(), wnjax.infer_axes(fn)(make(), x))
        return jax.lax.scan(step, (tree, optimizer.init(tree)), length=200)[1]

    wrapped = jax.jit(lambda: losses(wnjax.wrap(fn)))()
    folded = jax.jit(lambda: losses(lambda t, x: fn(wnjax.fold(t), x)))()
    assert wrapped[-1] < 0.5 * wrapped[0]
    np.testing.assert_allclose(wrapped, folded, rtol=1e-10)


def test_no_weight_is_built_where_outputs_are_smaller():
    x = jnp.ones((2, 3))
    tree = normalized(toys.mlp, toys.mlp_params(), x)

    def products(fn):  # of the second kernel with anything but itself, whose norm is taken
        eqns = jax.make_jaxpr(fn)(tree, x).jaxpr.eqns
        eqns = [e for e in eqns if e.primitive.name == "mul" and len(set(e.invars)) == 2]
        return [e for e in eqns if e.outvars[0].aval.shape == (8, 16)]

    assert len(products(lambda t, x: toys.mlp(wnjax.fold(t), x))) == 1
    assert not products(wnjax.wrap(toys.mlp))


def convolution(params, x):
    """A convolution, all whose outputs the second layer sums over; and one of three operands."""
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(h + params["bias"][None, None, None])
    flat = h.reshape(h.shape[0], -1)
    return flat @ params["dense"], jnp.einsum("bi,ijo,bj->bo", flat, params["bilinear"], flat)


def attention(params, x):
    """Heads, positions merged with the batch, a shift along the positions and a recurrence."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    y = jnp.einsum("bhts,bshk,hko->bto", weights, v, params["o"])
    merged = (y.reshape(-1, 4) @ params["w"]).reshape(y.shape)

    def step(h, x):
        return jnp.tanh(x + h @ params["u"]), None

    last, _ = jax.lax.scan(step, y[:, 0], jnp.moveaxis(merged, 1, 0))
    return (merged @ params["w"])[:, :-1], last


OPEN = {
    "convolution": (
        convolution,
        {"conv": (3, 3, 2, 3), "bias": (3,), "dense": (48, 5), "bilinear": (48, 48, 2)},
        "batch, 4, 4, 2",
        [(1, 4, 4, 2), (3, 4, 4, 2)],
    ),
    "attention": (
        attention,
        {**dict.fromkeys("qkv", (4, 2, 3)), "o": (2, 3, 4), "w": (4, 4), "u": (4, 4)},
        "batch, time, 4",
        [(2, 5, 4), (3, 2, 4)],
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_scalable", [False, True], ids=["by_size", "on_outputs"])
@pytest.mark.parametrize("name", OPEN)
def test_sizes_that_are_left_open(name, is_scalable, monkeypatch):
    """As in an export for any batch: axes, values and derivatives are those of numbers."""
    if is_scalable:
        monkeypatch.setattr(wrapping, "scales_output", lambda *_: True)
    fn, shapes, sizes, inputs = OPEN[name]
    rng = np.random.default_rng(0)
    params = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
    x = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.float64)
    tree = normalized(fn, params, jnp.ones(inputs[1]))
    assert wnjax.infer_axes(fn)(params, x) == wnjax.infer_axes(fn)(params, jnp.ones(inputs[1]))
    leaves, treedef = jax.tree.flatten(tree)

    def both(fn):
        def values_and_gradients(x, *leaves):
            tree = treedef.unflatten(leaves)
            with jax.numpy_dtype_promotion("standard"):
                return fn(tree, x), jax.tree.leaves(jax.grad(loss(fn, (x,)))(tree))

        return jax.jit(values_and_gradients)

    exported = export.export(both(wnjax.wrap(fn)))(x, *leaves)
    for shape in inputs:
        x = jnp.asarray(rng.normal(size=shape))
        expected = both(lambda tree, x: fn(wnjax.fold(tree), x))(x, *leaves)
        chex.assert_trees_all_close(exported.call(x, *leaves), expected, rtol=1e-9, atol=1e-9)


def test_open_sizes_count_as_large():
    batch, few = export.symbolic_shape("batch, few", constraints=["few <= 4"])
    assert not wrapping.scales_output(1000, batch)
    assert not wrapping.scales_output(1000, batch * few)
    assert wrapping.scales_output(1000, few * 3)


def test_sizes_decide():
    assert wrapping.scales_output(100, 100)
    assert not wrapping.scales_output(100, 101)


made_up = core.Primitive("made_up")  # 2x, but nobody knows
made_up.def_impl(lambda x: 2 * x)
made_up.def_abstract_eval(lambda x: x)
mlir.register_lowering(made_up, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
ad.deflinear2(made_up, lambda ct, _: [2 * ct])


@pytest.mark.usefixtures("always_on_outputs", "devices", "x64")
def test_an_unknown_operation_gets_the_folded_weight():
    def fn(params, x):
        return made_up.bind(x @ params["a"]) @ made_up.bind(params["b"]) @ params["c"]

    params = {name: jax.random.normal(jax.random.key(i), (4, 4)) for i, name in enumerate("abc")}
    x = jnp.eye(4)
    found = wnjax.infer_axes(fn)(params, x)
    assert found["b"].reason == "unknown operation made_up"
    assert found["b"].lines[0].split(":")[0].endswith("test_wrap.py")
    axes = found | {"b": wnjax.Weight(1)}
    tree = jax.tree.map(lambda x: 1.5 * x, wnjax.weight_norm(params, axes))
    actual, expected = (
        jax.jit(jax.value_and_grad(lambda t, f=f: jnp.sum(jnp.sin(f(t)))))(tree)
        for f in (lambda t: wnjax.wrap(fn)(t, x), lambda t: fn(wnjax.fold(t), x))
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)


@jax.custom_vjp
def reversed_gradient(w):
    return w


reversed_gradient.defvjp(lambda w: (w, None), lambda _, ct: (-ct,))


@jax.custom_jvp
def with_tanh(w):
    return w, jnp.tanh(w)


with_tanh.defjvp(lambda w, dw: (with_tanh(*w), (2 * dw[0], dw[0])))


def two_outputs(w, x):
    w, other = with_tanh(w)
    return x @ w, other


def from_the_body(w, x):
    carry, _ = jax.lax.scan(lambda c, _: (w, None), jnp.zeros((4, 4)), None, length=2)
    return x @ carry, x @ w


def last_slice(w, x):
    def step(carry, w):
        return (jnp.tanh(carry[0] @ w), w), None

    return jax.lax.scan(step, (x, jnp.zeros((4, 4))), jnp.stack([w, 2 * w]))[0]


def last_slice_of_a_stack(w, x):
    w = w.reshape(2, 2, 4)

    def step(carry, w):
        return (jnp.tanh(carry[0] @ w @ jnp.ones((4, 2))), w), None

    return jax.lax.scan(step, (x[:, :2], jnp.zeros((2, 4))), w)[0]


def changed_in_a_loop(w, x):
    def step(_, carry):
        return jnp.negative(-carry[0]), jnp.tanh(carry[0])

    same, other = jax.lax.fori_loop(0, 2, step, (w, jnp.zeros((4, 4))))
    return x @ same, other


def carried_and_checkpointed(w, x):
    def step(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w), None

    return jax.lax.scan(jax.checkpoint(step), (x, w), None, length=2)[0][0]


SILENT = {  # what a reader found that wrap once computed from v, or scaled twice
    "complex": lambda w, x: jnp.abs(jnp.fft.fft(x) @ w.astype(jnp.complex64)),
    "custom_vjp_on_the_weight": lambda w, x: x @ reversed_gradient(w),
    "custom_jvp_with_two_outputs": two_outputs,
    "weight_from_the_body_of_a_scan": from_the_body,
    "last_slice_leaves_a_scan": last_slice,
    "last_slice_of_a_stack": last_slice_of_a_stack,
    "changed_in_a_loop": changed_in_a_loop,
    "scan_over_a_new_axis": lambda w, x: jax.lax.scan(lambda c, w: (c @ w, None), x, w[None])[0],
    "carried_and_checkpointed": carried_and_checkpointed,
    "output_and_use": lambda w, x: (x @ w, w.T),
    "concatenated_output": lambda w, x: (x @ w, jnp.concatenate([w, w])),
}


@pytest.mark.usefixtures("always_on_outputs", "devices")
@pytest.mark.parametrize("name", SILENT)
def test_weights_that_do_more_than_be_summed_over(name):
    keys = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(keys[0], (4, 4)), jax.random.normal(keys[1], (3, 4))
    tree = jax.tree.map(lambda a: 1.5 * a + 0.1, wnjax.weight_norm({"w": w}, {"w": -1}))

    def total(f):
        return lambda tree: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(tree)))

    def fn(params, x):
        return SILENT[name](params["w"], x)

    actual, expected = (
        jax.jit(jax.value_and_grad(total(f)))(tree)
        for f in (lambda t: wnjax.wrap(fn)(t, x), lambda t: fn(wnjax.fold(t), x))
    )
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.usefixtures("always_on_outputs", "devices")
@pytest.mark.parametrize(
    "narrow",
    [
        lambda w: w.astype(jnp.float16),
        lambda w: jax.lax.reduce_precision(w, 5, 10).astype(jnp.float16),
    ],
    ids=["float16", "float16_reduced"],
)
def test_computing_in_a_narrow_range(narrow):
    """v·x would leave float16's range where w·x does not."""
    tree = {"w": wnjax.WeightNorm(jnp.ones((1, 4)), jnp.full((4, 4), 3e5))}
    y = wnjax.wrap(lambda p, x: x.astype(jnp.float16) @ narrow(p["w"]))(tree, jnp.ones((2, 4)))
    chex.assert_trees_all_close(y, jnp.full((2, 4), 2, jnp.float16), rtol=1e-2)


def test_static_leaves_beside_gv_leaves():
    tree = wnjax.weight_norm({"w": jnp.eye(3)}, {"w": -1}) | {"eps": 2.0, "name": "relu"}

    def fn(params, x):
        return getattr(jax.nn, params["name"])(x @ params["w"] + params["eps"])

    assert wnjax.infer_axes(fn)(tree, jnp.ones((1, 3)))["eps"].reason == "not an array"
    chex.assert_trees_all_close(wnjax.wrap(fn)(tree, jnp.ones((1, 3))), jnp.full((1, 3), 3.0))


@pytest.mark.usefixtures("always_on_outputs", "devices")
def test_zero_gains_train():
    def fn(params, x):
        return x @ params["w"]

    tree = wnjax.weight_norm({"w": jnp.zeros((3, 4))}, {"w": -1})
    grads = jax.jit(jax.grad(lambda t: jnp.sum(wnjax.wrap(fn)(t, jnp.ones((2, 3))))))(tree)
    assert jnp.all(grads["w"].g != 0)
    expected = jax.grad(lambda t: jnp.sum(fn(wnjax.fold(t), jnp.ones((2, 3)))))(tree)
    chex.assert_trees_all_close(grads, expected, rtol=1e-6)


@pytest.mark.usefixtures("always_on_outputs")
def test_norms_that_run_over_other_axes_than_the_sum():
    """PyTorch's Linear with dim=1 gives a gain to every input: its scale cannot ride."""
    params = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
    x = jnp.ones((2, 3))
    for features in (0, (), (0, 1)[:1]):
        tree = jax.tree.map(lambda a: 1.5 * a, wnjax.weight_norm(params, {"w": features}))
        actual = wnjax.wrap(lambda p, x: x @ p["w"])(tree, x)
        chex.assert_trees_all_close(actual, x @ wnjax.fold(tree)["w"], rtol=1e-5)


@pytest.mark.usefixtures("always_on_outputs")
def test_log_scale_and_low_precision():
    x = jnp.ones((2, 3), jnp.bfloat16)
    params = toys.mlp_params(jnp.bfloat16)
    tree = wnjax.weight_norm(params, log_scale=True)
    actual = wnjax.wrap(toys.mlp)(tree, x)
    assert actual.dtype == jnp.bfloat16
    chex.assert_trees_all_close(
        actual.astype(jnp.float32), toys.mlp(params, x).astype(jnp.float32), atol=0.1
    )


@pytest.mark.usefixtures("always_on_outputs")
def test_float16_stays_on_the_weight():
    """v·x may leave float16's range where w·x does not."""
    v = jnp.full((4, 1), 30000, jnp.float16)
    tree = {"w": wnjax.WeightNorm(jnp.ones((1, 1)), v)}
    actual = wnjax.wrap(lambda p, x: x @ p["w"])(tree, jnp.ones((1, 4), jnp.float16))
    assert actual == 2


def test_static_arguments_and_outputs():
    def fn(params, x, activation, *, bias, names=()):
        y = x @ params["w"]
        return {"y": activation(y + bias), "names": names, "none": None}

    tree = wnjax.weight_norm({"w": jnp.eye(3)}, {"w": -1})
    out = wnjax.wrap(fn)(tree, jnp.ones((1, 3)), jnp.tanh, bias=0.0, names=("a", "b"))
    assert out["names"] == ("a", "b")
    chex.assert_trees_all_close(out["y"], jnp.tanh(jnp.ones((1, 3))), rtol=1e-6)


def haiku_params():
    params = {"linear": {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}}
    return hk.data_structures.to_immutable_dict(params)


PLAIN = {
    "dict": toys.mlp_params,
    "folded": lambda: wnjax.fold(wnjax.weight_norm(toys.mlp_params())),
    "haiku": haiku_params,
    "equinox": lambda: eqx.nn.Linear(3, 4, key=jax.random.key(0)),
    "nnx state": lambda: nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0))),
    "boxes": lambda: {"w": nn.Partitioned(jnp.ones((3, 4)), (None, None))},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_tree_without_gv_leaves_goes_to_fn_as_it_is_with_one_warning(name):
    params = PLAIN[name]()
    wrapped = wnjax.wrap(lambda p: p)
    with pytest.warns(
        UserWarning, match=r"without weight normalization. Pass .*weight_norm\("
    ) as w:
        assert wrapped(params) is params
    assert [record.filename for record in w] == [__file__]
    wrapped(params)  # a second warning would be an error
    with pytest.warns(UserWarning, match="without weight normalization"):
        jax.jit(wnjax.wrap(jax.tree.leaves))(params)  # another function


NORMALIZED = {
    "dict": lambda: wnjax.weight_norm(toys.mlp_params()),
    "haiku": lambda: wnjax.weight_norm(
        hk.data_structures.to_mutable_dict(haiku_params()), {".*/w": -1}
    ),
    "equinox": lambda: wnjax.weight_norm(PLAIN["equinox"](), {"weight": 0}),
    "nnx state": lambda: wnjax.weight_norm(PLAIN["nnx state"]()),
    "nnx module": lambda: nnx.state(wnjax.nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))),
    "boxes": lambda: wnjax.weight_norm(PLAIN["boxes"](), {"w": 1}),
    "no weights": lambda: {"b": jnp.ones(3), "n": jnp.ones((2, 3), int), "name": "dense"},
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_no_warning_of_normalized_trees_or_where_nothing_is_a_weight(name):
    wnjax.wrap(lambda p: 0)(NORMALIZED[name]())


def test_compiles_once_and_takes_donated_input():
    x = jnp.ones((2, 3))
    tree = normalized(toys.mlp, toys.mlp_params(), x)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(wnjax.wrap(toys.mlp), 1))
    chex.assert_trees_all_close(step(tree, x), step(tree, x))
    grad = jax.jit(jax.grad(lambda t: wnjax.wrap(toys.mlp)(t, x).sum()), donate_argnums=0)
    chex.assert_tree_all_finite(grad(jax.tree.map(jnp.copy, tree)))


@dataclasses.dataclass
class Options:
    """Not hashable."""

    factor: float


def test_static_arguments_of_any_kind():
    tree, x = wnjax.weight_norm({"w": jnp.eye(4)}, {"w": 1}), jnp.ones((1, 4))
    scaled = wnjax.wrap(lambda p, x, options: options.factor * (x @ p["w"]))
    for factor in (2.0, 3.0):
        np.testing.assert_allclose(scaled(tree, x, Options(factor)), factor, rtol=1e-6)
    signed = wnjax.wrap(lambda p, x, zero: jnp.copysign(x @ p["w"], zero))
    assert (signed(tree, x, 0.0) > 0).all()
    assert (signed(tree, x, -0.0) < 0).all()


@pytest.mark.usefixtures("always_on_outputs")
def test_digits_that_are_dropped_are_those_of_the_weight():
    tree = {"w": wnjax.WeightNorm(jnp.full((1, 4), 3.7), jnp.arange(1.0, 17.0).reshape(4, 4))}
    x = jnp.eye(4)

    def fn(p, x):
        return x @ jax.lax.reduce_precision(p["w"], 8, 2)

    np.testing.assert_array_equal(wnjax.wrap(fn)(tree, x), fn(wnjax.fold(tree), x))


@pytest.mark.usefixtures("always_on_outputs")
def test_gradients_may_be_transposed_again():
    """`jax.vjp` gives a linear function; it has the order of gradients inside."""
    tree = wnjax.weight_norm({"w": jnp.arange(12.0).reshape(3, 4)}, {"w": 1})
    y, vjp = jax.vjp(wnjax.wrap(lambda p, x: jnp.tanh(x @ p["w"])), tree, jnp.ones((2, 3)) / 9)
    expected, _ = jax.vjp(lambda p, x: jnp.tanh(x @ wnjax.fold(p)["w"]), tree, jnp.ones((2, 3)) / 9)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    (twice,) = jax.linear_transpose(vjp, y)(vjp(y))
    jacobian = jax.jacobian(lambda p, x: jnp.tanh(x @ wnjax.fold(p)["w"]), (0, 1))(
        tree, jnp.ones((2, 3)) / 9
    )
    rows = [np.reshape(part, (y.size, -1)) for part in jax.tree.leaves(jacobian)]
    matrix = np.concatenate(rows, axis=1).astype(np.float64)
    np.testing.assert_allclose(twice.ravel(), matrix @ matrix.T @ y.ravel(), rtol=1e-4)
