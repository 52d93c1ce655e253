"""Inside `shard_map`, with the fan-in axes of weights split: shards give what the whole gives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import wnjax
from tests import toys
from tests.test_contract import off_start, stepped
from tests.test_sharding import collectives, normal, put

P = jax.P
# Of a (64, 32) weight on 2 x 4 devices: its spec, over what its fan-in axis is split, and the
# gains on a device.
LAYOUTS = {
    "fan-in": (P("tensor", None), "tensor", 32),
    "fan-in over two": (P(("data", "tensor"), None), ("data", "tensor"), 32),
    "both": (P("tensor", "data"), "tensor", 16),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
AXES = {"w": -1}


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)


def parameters():
    return {"w": normal(64, 32), "bias": normal(32, seed=1)}


def specs_of(tree, spec):
    """The spec of the weight on the axes that an array has of it, for all arrays of a tree."""

    def one(x):
        whole = (None, *spec[1:]) if x.ndim == 1 else spec
        return P(*(None if size == 1 else name for size, name in zip(x.shape, whole, strict=False)))

    return jax.tree.map(lambda x: P(spec[1]) if x.ndim == 1 else one(x), tree)


def layer(params, x, axis_name=None):
    """A dense layer, row-parallel where its fan-in axis is split."""
    y = x @ params["w"]
    y = jax.lax.psum(y, axis_name) if axis_name else y
    return y + jnp.broadcast_to(params["bias"], y.shape)


def wrapped(axis_name=None):
    """The layer applied to ones: its outputs are fewer than its weights, so that scales ride."""

    def fn(params):
        ones = np.ones((1, params["w"].shape[0]), np.float32)
        return {"y": layer(params, ones, axis_name)}

    return wnjax.wrap(fn, axis_name=axis_name)


def optimized(make, optimizer):
    return lambda **axis_name: stepped(make(optimizer, **axis_name))


def projected(optimizer, **axis_name):
    return optax.chain(optimizer, wnjax.keep_norms(AXES, **axis_name))


# name: what makes a function of one tree, given its axis_name, and the function's input.
FUNCTIONS = {
    "weight_norm": (lambda **name: partial(wnjax.weight_norm, axes=AXES, **name), lambda p: p),
    "weight_norm_log": (
        lambda **name: partial(wnjax.weight_norm, axes=AXES, log_scale=True, **name),
        lambda p: p,
    ),
    "fold": (lambda **name: partial(wnjax.fold, **name), off_start),
    "norms": (lambda **name: partial(wnjax.norms, **name), off_start),
    "wrap": (wrapped, off_start),
    "weight_normalized": (
        optimized(partial(wnjax.weight_normalized, axes=AXES), optax.sgd(0.1)),
        lambda p: p,
    ),
    "keep_norms": (optimized(projected, optax.sgd(0.1)), lambda p: p),
    "keep_norms of (g, v) leaves": (optimized(projected, optax.sgd(0.1)), off_start),
}


def case(name):
    make, prepare = FUNCTIONS[name]
    if prepare is off_start:
        prepare = off_start(partial(wnjax.weight_norm, axes=AXES))
    return make, prepare(parameters())


def value_and_gradient(fn):
    def total(tree):
        out = fn(tree)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("layout", "check_vma"), [("both", False), *((layout, True) for layout in LAYOUTS)]
)
def test_shards_give_what_the_whole_gives(name, layout, check_vma):
    """Values, and gradients taken around `shard_map`."""
    spec, axis_name, _ = LAYOUTS[layout]
    make, tree = case(name)
    whole = make()
    shards = jax.shard_map(
        make(axis_name=axis_name),
        mesh=make_mesh(),
        in_specs=(specs_of(tree, spec),),
        out_specs=specs_of(jax.eval_shape(whole, tree), spec),
        check_vma=check_vma,
    )
    chex.assert_trees_all_close(
        value_and_gradient(shards)(tree), value_and_gradient(whole)(tree), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", ["fold", "weight_norm"])
@pytest.mark.parametrize("jitted", [False, True])
def test_explicit_axes(name, jitted):
    spec, axis_name, _ = LAYOUTS["both"]
    make, tree = case(name)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(put, tree, specs_of(tree, spec))
        out_specs = specs_of(jax.eval_shape(make(), tree), spec)
        fn = jax.shard_map(make(axis_name={"w": axis_name}), mesh=mesh, out_specs=out_specs)
        found = (jax.jit(fn) if jitted else fn)(placed)
    chex.assert_trees_all_close(jax.device_get(found), make()(tree), rtol=1e-5, atol=1e-6)


@layouts
@pytest.mark.parametrize("form", ["fold", "wrap"])
def test_a_sum_for_the_norm_and_one_for_its_gradient_are_sent(layout, form):
    """Of one number a neuron, beside what the plain layer sends; gradients are taken inside."""
    spec, axis_name, gains = LAYOUTS[layout]
    others = [name for name in ("data", "tensor") if spec[1] == name]
    plain, x = parameters(), normal(3, 64, seed=2)
    tree = off_start(partial(wnjax.weight_norm, axes=AXES))(plain)
    row = partial(layer, axis_name=axis_name)
    normalized = {
        "fold": lambda tree, x: row(wnjax.fold(tree, axis_name=axis_name), x),
        "wrap": wnjax.wrap(row, axis_name=axis_name),
    }[form]

    def gradient(fn, tree):
        def loss(tree, x):
            total = jnp.sum(jnp.sin(fn(tree, x)))
            return jax.lax.psum(total, others) if others else total

        specs = specs_of(tree, spec)
        in_specs = (specs, P(None, spec[0]))
        return jax.shard_map(jax.grad(loss), mesh=make_mesh(), in_specs=in_specs, out_specs=specs)

    sent = collectives(gradient(normalized, tree), tree, x)
    for one in collectives(gradient(row, plain), plain, x):
        sent.remove(one)
    assert sent == [("all-reduce", gains)] * 2
    whole = jax.grad(lambda tree: jnp.sum(jnp.sin(layer(wnjax.fold(tree), x))))(tree)
    found = jax.jit(gradient(normalized, tree))(tree, x)
    chex.assert_trees_all_close(found, whole, rtol=1e-4, atol=1e-5)


# A column-parallel layer and a row-parallel one, with the batch split over the other mesh axis.
SHAPES = {"up": (16, 32), "bias": (32,), "down": (32, 24)}
SPECS = {
    (16, 32): P(None, "tensor"),
    (1, 32): P(None, "tensor"),
    (32,): P("tensor"),
    (32, 24): P("tensor", None),
    (1, 24): P(None, None),
    (): P(),
}
KERNELS = {"up|down": -1}
ROW = {"down": "tensor"}


def mlp(params, x, total=lambda y: y):
    y = x @ params["up"]
    y = jnp.tanh(y + jnp.broadcast_to(params["bias"], y.shape))
    return total(y @ params["down"])


def lax_total(y):
    return jax.lax.psum(y, "tensor")


@jax.custom_vjp
def total_with_identity_transpose(y):
    """The sum of a row-parallel layer as one writes it where nothing is checked."""
    return jax.lax.psum(y, "tensor")


total_with_identity_transpose.defvjp(
    lambda y: (total_with_identity_transpose(y), None), lambda _, ct: (ct,)
)


def mlp_parameters(form):
    params = {name: normal(*shape, seed=i) / 4 for i, (name, shape) in enumerate(SHAPES.items())}
    as_gv_leaves = off_start(partial(wnjax.weight_norm, axes=KERNELS))
    return params if form in ("weight_normalized", "keep_norms") else as_gv_leaves(params)


def specs_by_shape(tree):
    return jax.tree.map(lambda x: SPECS[x.shape], tree)


def of_form(form, optimizer, axis_name=None, **total):
    """The loss of a shard of the batch, and the optimizer."""
    fn = partial(mlp, **total)
    if form == "wrap":
        fn = wnjax.wrap(fn, axis_name=axis_name)
    if form == "fold":
        plain = fn

        def fn(tree, x):
            return plain(wnjax.fold(tree, axis_name=axis_name), x)

    if form == "weight_normalized":
        optimizer = wnjax.weight_normalized(optimizer, KERNELS, axis_name=axis_name)
    if form == "keep_norms":
        optimizer = optax.chain(optimizer, wnjax.keep_norms(KERNELS, axis_name=axis_name))
    return (lambda tree, x, y: jnp.mean((fn(tree, x) - y) ** 2)), optimizer


def train(loss, optimizer, params, state, *batch):
    """Three steps."""
    with jax.numpy_dtype_promotion("standard"):  # for optax
        for _ in range(3):
            grads = jax.grad(loss)(params, *batch)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["fold", "wrap", "weight_normalized", "keep_norms"])
@pytest.mark.parametrize(("make", "init_inside"), [(optax.sgd, False), (optax.adam, True)])
def test_training_steps_are_those_of_the_whole(form, make, init_inside):
    batch = normal(8, 16, seed=3), normal(8, 24, seed=4)
    params, batch = toys.in_float64((mlp_parameters(form), batch))
    loss, optimizer = of_form(form, make(0.05))
    expected = jax.jit(partial(train, loss, optimizer))(params, optimizer.init(params), *batch)
    loss, optimizer = of_form(form, make(0.05), ROW, total=lax_total)

    def whole_loss(*args):
        return jax.lax.pmean(loss(*args), "data")

    def run(params, state, *batch):
        state = optimizer.init(params) if init_inside else state
        return train(whole_loss, optimizer, params, state, *batch)

    state = optimizer.init(params)  # of whole arrays
    specs = specs_by_shape(params)
    shards = jax.shard_map(
        run,
        mesh=make_mesh(),
        in_specs=(specs, specs_by_shape(state), P("data"), P("data")),
        out_specs=specs,
    )
    found = jax.jit(shards)(params, state, *batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-12)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("form", ["fold", "wrap"])
def test_unchecked_gradients_taken_inside_are_parts_for_g_alone(form):
    """The transpose of `psum` is no identity there: that of the plain layer is to be written so."""
    normalized_params, batch = mlp_parameters(form), (normal(8, 16, seed=3), normal(8, 24, seed=4))
    loss, _ = of_form(form, None)
    expected = jax.jit(jax.grad(loss))(normalized_params, *batch)
    loss, _ = of_form(form, None, ROW, total=total_with_identity_transpose)

    def gradient(normalized_params, *batch):
        grads = jax.lax.pmean(jax.grad(loss)(normalized_params, *batch), "data")
        down = grads["down"]
        return grads | {"down": down._replace(g=jax.lax.psum(down.g, "tensor"))}

    specs = specs_by_shape(normalized_params)
    shards = jax.shard_map(
        gradient,
        mesh=make_mesh(),
        in_specs=(specs, P("data"), P("data")),
        out_specs=specs,
        check_vma=False,
    )
    chex.assert_trees_all_close(
        jax.jit(shards)(normalized_params, *batch), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_pmap_and_vmap(transform):
    """They check nothing, either."""
    gv = off_start(partial(wnjax.weight_norm, axes=AXES))(parameters())["w"]
    x = normal(3, 64, seed=2)

    def loss(gv, x, total=lambda y: y, axis_name=None):
        return jnp.sum(jnp.sin(total(x @ wnjax.fold(gv, axis_name=axis_name))))

    def part(g, v, x):
        shard = partial(loss, total=total_with_identity_transpose, axis_name="tensor")
        value, grads = jax.value_and_grad(shard)(wnjax.WeightNorm(g, v), x)
        return value, jax.lax.psum(grads.g, "tensor"), grads.v

    parts = transform(part, axis_name="tensor", in_axes=(None, 0, 0))
    values, g, v = parts(gv.g, gv.v.reshape(8, 8, 32), jnp.moveaxis(x.reshape(3, 8, 8), 1, 0))
    value, grads = jax.value_and_grad(loss)(gv, x)
    np.testing.assert_allclose(values, np.full(8, value), rtol=1e-4)
    np.testing.assert_allclose(g, np.stack([grads.g] * 8), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v.reshape(64, 32), grads.v, rtol=1e-4, atol=1e-5)


def test_neurons_of_zeros_and_extreme_ones():
    """In float32, ‖w‖² of the second neuron underflows, and of the third one overflows."""
    w = jnp.stack([jnp.zeros(64), normal(64) * 1e-25, normal(64) * 1e25, normal(64)], 1)
    c = normal(64, 4, seed=1)
    shards = partial(jax.shard_map, mesh=make_mesh())
    normalized_params = jax.jit(
        shards(
            partial(wnjax.weight_norm, axes=AXES, axis_name="tensor"),
            in_specs=({"w": P("tensor")},),
            out_specs={"w": wnjax.WeightNorm(P(), P("tensor"))},
        )
    )({"w": w})
    norms = np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, 0, keepdims=True))
    np.testing.assert_allclose(normalized_params["w"].g, norms, rtol=1e-5)
    v = np.asarray(normalized_params["w"].v)
    np.testing.assert_allclose(np.abs(v[:, 1:3]).max(0), 1, rtol=1e-6)  # of all shards
    assert 0.5 < np.linalg.norm(v[:, 0]) < 1.5
    assert not np.array_equal(v[:16, 0], v[16:32, 0])

    def total(w):
        gv = wnjax.weight_norm({"w": w}, AXES, axis_name="tensor")
        return wnjax.fold(gv, axis_name="tensor")["w"]

    around = shards(total, in_specs=P("tensor"), out_specs=P("tensor"))
    folded, gradient = jax.jit(jax.value_and_grad(lambda w: jnp.sum(c[:, 1:] * around(w))))(
        w[:, 1:]
    )
    assert np.isfinite(folded)
    np.testing.assert_allclose(gradient, c[:, 1:], rtol=1e-4, atol=1e-5)


def test_outside_it_changes_nothing():
    for name, (make, _) in FUNCTIONS.items():
        if name != "wrap":  # its layer sums over the mesh itself
            _, tree = case(name)
            chex.assert_trees_all_equal(make(axis_name="tensor")(tree), make()(tree))


REFUSED = {
    "the norm of a shard": (P("tensor"), P(), None, r"^w: .* seem to be split over 'tensor'"),
    "another axis": (P("tensor"), P(), "data", r"^w: axis_name says .* 'data', but it is the same"),
    "both": (P("tensor"), P(), ("tensor", "data"), r"split over 'data', but it is the same"),
    "neurons": (P(None, "tensor"), P(None, "tensor"), "tensor", r"^w: .* but its gain differs"),
    "no leaf": (P("tensor"), P(), {"v": "tensor"}, r"axis_name: the pattern 'v' matches no leaf"),
    "unbound": (P("tensor"), P(), "model", r"'model' is no axis here; .* 'data' and 'tensor'"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("name", ["fold", "norms", "wrap", "keep_norms of (g, v) leaves"])
def test_refused(why, name):
    v_spec, g_spec, axis_name, message = REFUSED[why]
    _, tree = case("fold")
    if name == "wrap":

        def fn(tree):
            wnjax.wrap(lambda params: params["w"].sum(), axis_name=axis_name)(tree)

    else:

        def fn(tree):
            FUNCTIONS[name][0](axis_name=axis_name)(tree)

    specs = {"w": wnjax.WeightNorm(g_spec, v_spec), "bias": P()}
    with pytest.raises(ValueError, match=message):
        jax.shard_map(fn, mesh=make_mesh(), in_specs=(specs,), out_specs=None)(tree)


@pytest.mark.parametrize("why", ["another axis", "no leaf", "unbound"])
@pytest.mark.parametrize("name", ["weight_norm", "weight_normalized", "keep_norms"])
def test_refused_of_plain_weights(why, name):
    spec, _, axis_name, message = REFUSED[why]

    def fn(params):
        FUNCTIONS[name][0](axis_name=axis_name)(params)

    specs = {"w": spec, "bias": P()}
    with pytest.raises(ValueError, match=message):
        jax.shard_map(fn, mesh=make_mesh(), in_specs=(specs,), out_specs=None)(parameters())


def test_a_line_search_evaluates_the_folded_whole():
    """What optax calls value_fn takes plain weights."""

    def update(updates, state, params, value_fn, **_):
        return jax.tree.map(lambda x: jnp.full_like(x, value_fn(params)), updates), state

    line_search = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)

    def stepped_bias(params, axis_name=None):
        def value_fn(params):
            value = jnp.sum(jnp.sin(params["w"]))
            return jax.lax.psum(value, axis_name) if axis_name else value

        optimizer = wnjax.weight_normalized(line_search, AXES, axis_name=axis_name)
        state = optimizer.init(params)
        return optimizer.update(params, state, params, value_fn=value_fn)[0]["bias"]

    shards = jax.shard_map(
        partial(stepped_bias, axis_name="tensor"),
        mesh=make_mesh(),
        in_specs=({"w": P("tensor"), "bias": P()},),
        out_specs=P(),
    )
    params = parameters()
    np.testing.assert_allclose(jax.jit(shards)(params), stepped_bias(params), rtol=1e-4)


@pytest.mark.parametrize("whole", [(), {"w": None}, {"w": ()}])
def test_gathered_weights(whole):
    """To JAX they differ between devices still."""
    gv = off_start(partial(wnjax.weight_norm, axes=AXES))(parameters())["w"]

    def fold(gv, axis_name):
        v = jax.lax.all_gather(gv.v, "tensor", tiled=True)
        w = wnjax.fold({"w": gv._replace(v=v)}, axis_name=axis_name)["w"]
        return jax.lax.dynamic_slice_in_dim(w, 16 * jax.lax.axis_index("tensor"), 16)

    def gathered(axis_name):
        return jax.shard_map(
            partial(fold, axis_name=axis_name),
            mesh=make_mesh(),
            in_specs=(wnjax.WeightNorm(P(), P("tensor")),),
            out_specs=P("tensor"),
        )

    np.testing.assert_allclose(jax.jit(gathered(whole))(gv), wnjax.fold(gv), rtol=1e-6)
    with pytest.raises(ValueError, match=r"or say there that these axes are whole .* by \(\)"):
        gathered(None)(gv)


def test_lengths_that_do_not_fit_are_refused():
    params, optimizer = parameters(), wnjax.weight_normalized(optax.sgd(0.1), AXES)

    def update(params, state):
        optimizer.update(params, state, params)

    state = optimizer.init(params)
    specs = ({"w": P("tensor"), "bias": P()}, jax.tree.map(lambda _: P(), state))
    with pytest.raises(ValueError, match=r"^w: its fan-in axes seem to be split"):
        jax.shard_map(update, mesh=make_mesh(), in_specs=specs, out_specs=None)(params, state)


@pytest.mark.parametrize("axis_name", [3, ["tensor"], ("tensor", 0), {".*": 0}])
def test_what_is_no_name_is_refused(axis_name):
    with pytest.raises(TypeError, match="axis_name must be None, the name of a mesh axis, a tuple"):
        wnjax.weight_norm(parameters(), AXES, axis_name=axis_name)
