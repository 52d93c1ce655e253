"""`infer_axes` against axes that were derived by hand."""

import contextlib
import gc
import re

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.extend.core import primitives

import wnjax
from tests import toys, traced_layers, traced_layers_flax, traced_layers_nested, traced_models
from wnjax._analysis.calls import CALLS
from wnjax._analysis.jaxprs import RULES
from wnjax._leaves.trees import flatten, unbox

LAYERS = traced_layers.CASES | traced_layers_flax.CASES | traced_layers_nested.CASES
MODELS = traced_models.MODELS


def decisions(tree):
    """From slash paths to decisions."""
    return {path: unbox(leaf) for path, leaf in flatten(tree)[0]}


def check(found, expected):
    for path, decision in decisions(found).items():
        (want,) = [want for pattern, want in expected.items() if re.fullmatch(pattern, path)]
        if isinstance(want, str):
            assert isinstance(decision, wnjax.NotWeight), path
            assert want in decision.reason, path
        else:
            assert isinstance(decision, wnjax.Weight), (path, decision)
            assert decision.feature_axes == want, path


def biases(found):
    neurons = {p: d for p, d in decisions(found).items() if isinstance(d, wnjax.Weight)}
    return {path: d.bias for path, d in neurons.items() if d.bias}


def warning(name):
    """What `infer_axes` warns of in a layer."""
    is_masked = name in traced_layers.MASKED
    return pytest.warns(UserWarning, match="a mask") if is_masked else contextlib.nullcontext()


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    fn, params, args = LAYERS[name].build()
    with warning(name):
        found = wnjax.infer_axes(fn)(params, *args)
    check(found, LAYERS[name].expected)
    if LAYERS[name].biases is not None:
        assert biases(found) == LAYERS[name].biases


@pytest.mark.parametrize("is_full_size", [False, True], ids=["tiny", "full_size"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, is_full_size):
    """At full size everything is abstract: nothing is computed, and no memory needed.

    Every leaf is understood, biases of two axes and tables among them; but for a weight that
    WaveNet does not use, and weights that StyleGAN divides by their own lengths.
    """
    fn, params, args = MODELS[name].build(is_full_size)
    found = wnjax.infer_axes(fn, strict=name not in ("wavenet", "stylegan"))(params, *args)
    check(found, MODELS[name].expected)
    if MODELS[name].biases is not None:
        neurons = [p for p, d in decisions(found).items() if isinstance(d, wnjax.Weight)]
        expected = {
            path: match.expand(template)
            for path in neurons
            for pattern, template in MODELS[name].biases.items()
            if (match := re.fullmatch(pattern, path))
        }
        assert biases(found) == expected


def linear(params, x):
    return x @ params["w"] + params["b"]


X = jnp.ones((2, 3))
LINEAR = {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4))}


def test_what_a_neuron_tells():
    found = wnjax.infer_axes(linear)(LINEAR, X)
    assert found["w"] == wnjax.Weight((1,), bias="b", operation="dot_general")
    assert found["b"].reason == "bias of w"


def test_what_a_refusal_tells():
    """Shape, line, and an override that works when it is pasted."""

    def fn(params, x):
        return x @ jnp.exp(params["layers.0"])

    params = {"layers.0": jnp.ones((3, 4))}
    refused = wnjax.infer_axes(fn)(params, X)["layers.0"]
    assert refused.reason == "function of the parameter (exp)"
    assert refused.shape == (3, 4)
    (line,) = refused.lines
    assert "test_infer_axes.py" in line
    assert "fn" in line
    overrides = eval(refused.override.removeprefix("overrides="))
    overridden = wnjax.infer_axes(fn, overrides=overrides)(params, X)
    assert overridden["layers.0"].feature_axes == (1,)


def test_both_lines_of_a_conflict():
    def fn(params, x):
        x = x @ params["w"]
        return x @ params["w"].T

    refused = wnjax.infer_axes(fn)({"w": jnp.ones((3, 4))}, X)["w"]
    lines = [int(line.split("test_infer_axes.py:")[1].split(" ")[0]) for line in refused.lines]
    first = fn.__code__.co_firstlineno
    assert lines == [first + 1, first + 2]


def test_overrides_win():
    found = wnjax.infer_axes(linear, overrides={"w": 0, "b": None})(LINEAR, X)
    assert found["w"] == wnjax.Weight((0,), bias="b", operation="dot_general")
    assert found["b"].reason == "the pattern 'b' says None"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [({"v": 0}, "overrides: the pattern 'v' matches no leaf"), ({"w": 2}, "w of shape .3, 4.")],
)
def test_overrides_that_do_not_fit(overrides, words):
    with pytest.raises(ValueError, match=words):
        wnjax.infer_axes(linear, overrides=overrides)(LINEAR, X)


def test_strict_lists_all_refusals_at_once():
    def fn(params, x):
        return (x @ jnp.exp(params["a"])) * jnp.fft.fft(params["b"]).real + params["c"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4)), "c": jnp.ones(())}
    with pytest.raises(ValueError, match="2 leaves") as error:
        wnjax.infer_axes(fn, strict=True)(params, X)
    message = str(error.value)
    assert "a: function of the parameter (exp); shape (3, 4); at " in message
    assert "b: unknown operation fft; shape (2, 4); at " in message
    assert "overrides={'a': (1,)}" in message
    assert "\n  c" not in message  # it has one axis
    strict = wnjax.infer_axes(fn, strict=True, overrides={"a": 1, "b": None})(params, X)
    assert strict["a"].feature_axes == (1,)


def test_keywords_of_the_function_are_no_options():
    def fn(params, x, strict, overrides):
        return strict * (x @ params["w"]) + overrides

    found = wnjax.infer_axes(fn)({"w": jnp.ones((3, 4))}, X, strict=2.0, overrides=1.0)
    assert found["w"].feature_axes == (1,)


def test_a_gradient_or_a_train_step_is_refused():
    def loss(params, x):
        return jnp.sum(jnp.tanh(linear(params, x)))

    def step(params, x):
        return optax.apply_updates(params, jax.grad(loss)(params, x)), loss(params, x)

    for fn in (jax.grad(loss), jax.value_and_grad(loss), step):
        with pytest.raises(ValueError, match="Pass the forward function instead"):
            wnjax.infer_axes(fn)(LINEAR, X)
    assert wnjax.infer_axes(loss)(LINEAR, X)["w"].feature_axes == (1,)


def test_a_derivative_inside_the_forward_function_is_none_of_its_weights_business():
    """As in networks for physics, whose outputs are derivatives by the inputs."""

    def fn(params, x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(linear(params, x)) ** 3))(x)

    assert wnjax.infer_axes(fn)(LINEAR, X)["w"].feature_axes == (1,)


def branching(params, x):
    return linear(params, x) if x.sum() > 0 else x


def to_numpy(params, x):
    return linear(params, np.asarray(x))


def of_data_size(params, x):
    return linear(params, jnp.ones((int(x[0, 0]), 3)))


@pytest.mark.parametrize(
    ("fn", "advice"),
    [
        (branching, "use jnp.where or jax.lax.cond"),
        (to_numpy, "Use jax.numpy instead of numpy"),
        (of_data_size, "use jnp.where or jax.lax.cond"),
    ],
)
def test_functions_that_need_values(fn, advice):
    line = fn.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=advice) as error:
        wnjax.infer_axes(fn)(LINEAR, X)
    assert f"test_infer_axes.py:{line}" in str(error.value)


def test_an_axis_name_that_nothing_binds():
    def fn(params, x):
        return jax.lax.pmean(linear(params, x), "batch")

    with pytest.raises(ValueError, match=r"axis name 'batch' at .*test_infer_axes\.py") as error:
        wnjax.infer_axes(fn)(LINEAR, X)
    assert "jax.vmap(fn, axis_name='batch'" in str(error.value)
    bound = jax.vmap(fn, in_axes=(None, 0), axis_name="batch")
    assert wnjax.infer_axes(bound)(LINEAR, X[None])["w"].feature_axes == (1,)


def test_errors_of_the_function_itself_pass_through():
    with pytest.raises(KeyError, match="nothing"):
        wnjax.infer_axes(lambda params, x: params["nothing"])(LINEAR, X)


def test_static_arguments_and_abstract_ones():
    def fn(params, x, *, train, scale=None):
        return linear(params, x) if train else x

    shapes = jax.eval_shape(lambda: (LINEAR, X))
    assert wnjax.infer_axes(fn)(*shapes, train=True)["w"].feature_axes == (1,)
    assert wnjax.infer_axes(fn)(*shapes, train=False)["w"].reason == "unused by the output"


def test_gv_leaves_are_handled_for_the_function():
    tree = wnjax.weight_norm(LINEAR, {"w": -1})
    assert wnjax.infer_axes(linear)(tree, X)["w"].feature_axes == (1,)


def test_leaves_that_are_no_floating_point_arrays():
    def fn(params, x):
        return x @ params["w"][params["order"]]

    found = wnjax.infer_axes(fn)({"w": jnp.ones((3, 4)), "order": jnp.arange(3), "name": 1}, X)
    assert found["order"].reason == "not floating-point but int32"
    assert found["name"].reason == "not an array"


def test_boxes_are_kept_and_weight_norm_takes_the_tree():
    for make in toys.TREES.values():
        params = make()

        def fn(params, x):
            leaves = {path: unbox(leaf) for path, leaf in flatten(params)[0]}
            first, second = (leaf for leaf in leaves.values() if leaf.ndim == 2)
            return x @ first @ second

        axes = wnjax.infer_axes(fn)(params, X)
        expected = wnjax.weight_norm(params)
        assert jax.tree.structure(axes) == jax.tree.structure(params)
        chex.assert_trees_all_equal(wnjax.weight_norm(params, axes), expected)


def test_summary():
    def fn(params, x):
        return linear(params, x) + params["table"][jnp.argmax(x, axis=1)]

    summary = wnjax.summary(wnjax.infer_axes(fn)(LINEAR | {"table": jnp.ones((3, 4))}, X))
    assert "w      feature axes (1,), bias b, by dot_general" in summary
    assert "table  no: lookup table; shape (3, 4); at " in summary
    assert summary.endswith("1 of 3 leaves are weights of neurons")


NO_BIAS = {
    "of_part_of_the_neurons": lambda w, b, x: (x @ w[:, :3] + b[:3], x @ w[:, 3:]),
    "in_reversed_order": lambda w, b, x: x @ w + b[::-1],
    "in_another_order": lambda w, b, x: x @ w + b[np.array([2, 0, 1, 3])],
    "subtracted": lambda w, b, x: x @ w - b,
    "multiplied": lambda w, b, x: x @ w + 3 * b,
    "a_part_of_more": lambda w, b, x: x @ w[:, :2] + b[:2],
}


@pytest.mark.parametrize("name", NO_BIAS)
def test_what_is_no_bias_of_exactly_these_neurons(name):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    with jax.numpy_rank_promotion("allow"):
        found = wnjax.infer_axes(lambda p, x: NO_BIAS[name](p["w"], p["b"], x))(
            params, jnp.ones((2, 4))
        )
    assert found["w"].bias is None
    assert found["w"].feature_axes == (1,)
    assert found["b"].reason == "added to activations"


def test_positions_that_are_picked_and_summed_over():
    """Axis 0 is both: summed over along one axis of the picked positions, kept along the other."""
    positions = np.array([[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 0]])

    def fn(w, x):
        return jnp.einsum("bui,tuio->bto", x, w[positions])

    found = wnjax.infer_axes(fn)(jnp.ones((5, 4, 6)), jnp.ones((2, 4, 4)))
    assert found.reason == "only part of axis 0 is summed"


LETTERS = "abcdef"


@st.composite
def einsums(draw):
    """An equation x,w->y in which every axis of w is in x, or in y, or in both."""
    of_w = draw(st.permutations(LETTERS))[: draw(st.integers(1, 4))]
    roles = {a: draw(st.sampled_from(["sum", "feature", "batch"])) for a in of_w}
    roles[of_w[0]] = "sum"
    in_x = [a for a in of_w if roles[a] != "feature"] + ["z"]
    in_y = [a for a in of_w if roles[a] != "sum"] + ["z"]
    x, y = "".join(draw(st.permutations(in_x))), "".join(draw(st.permutations(in_y)))
    return x, "".join(of_w), y


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(einsums())
def test_any_einsum(letters):
    """Every element of the output depends on exactly one index of the feature axes."""
    x, w, y = letters
    shape = (2,) * len(w)
    found = wnjax.infer_axes(lambda p, values: jnp.einsum(f"{x},{w}->{y}", values, p))(
        jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((2,) * len(x), jnp.float32)
    )
    inputs = np.random.default_rng(0).normal(size=(2,) * len(x))
    columns = [np.einsum(f"{x},{w}->{y}", inputs, e.reshape(shape)) for e in np.eye(2 ** len(w))]
    depends = np.stack(columns, -1).reshape(-1, *shape) != 0
    for element in depends:
        indices = np.argwhere(element)
        varying = {axis for axis in range(len(w)) if len(set(indices[:, axis])) > 1}
        assert varying == set(range(len(w))) - set(found.feature_axes)


@st.composite
def einsums_of_three(draw):
    """An equation of x, y and w, in any order, and sizes; every axis of w is in x, y or z."""
    of_w = draw(st.permutations(LETTERS))[: draw(st.integers(1, 4))]
    places = st.sets(st.sampled_from("xyz"), min_size=1)
    roles = {a: draw(places) for a in of_w}
    roles[of_w[0]] -= {"z"}
    roles[of_w[0]] |= {draw(st.sampled_from("xy"))}
    roles["n"] = {"x", "y", "z"}
    terms = {t: "".join(draw(st.permutations([a for a in roles if t in roles[a]]))) for t in "xyz"}
    operands = draw(st.permutations([terms["x"], terms["y"], "".join(of_w)]))
    sizes = {a: draw(st.sampled_from([2, 3, 16])) for a in roles}
    return ",".join(operands) + "->" + terms["z"], "".join(of_w), sizes


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(einsums_of_three())
def test_any_einsum_of_three_operands(case):
    """The feature axes are those of the output, in whatever order `einsum` sums."""
    equation, w, sizes = case
    terms, output = equation.split("->")

    def shape(term):
        return jax.ShapeDtypeStruct(tuple(sizes[a] for a in term), jnp.float32)

    place = terms.split(",").index(w)

    def fn(params, *xs):
        return jnp.einsum(equation, *xs[:place], params, *xs[place:])

    others = [shape(term) for i, term in enumerate(terms.split(",")) if i != place]
    found = wnjax.infer_axes(fn)(shape(w), *others)
    assert found.feature_axes == tuple(i for i, a in enumerate(w) if a in output)


def test_a_basis_is_not_initialized_as_if_it_were_data():
    """The outputs of `w @ MATRIX` are no pre-activations; those of `MATRIX @ w` are none either."""
    matrix, x = traced_layers.MATRIX, jnp.ones((2, 4))
    for fn in (lambda p, x: x @ (p["w"] @ matrix), lambda p, x: x @ (matrix @ p["w"])):
        with pytest.raises(ValueError, match="nothing to initialize"):
            wnjax.data_init(fn)({"w": jnp.ones((4, 4))}, x)


def test_a_weight_that_was_masked_before():
    """As the warning says: the norm is that of what is summed, and masked entries stay 0."""
    mask = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    w = jnp.array([[1.0, 90.0], [2.0, 3.0], [-80.0, 4.0]])
    x, y = jnp.array([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]]), jnp.array([[1.0, 2.0], [0.0, 1.0]])

    def fn(params, x):
        return x @ (params["w"] * mask)

    with pytest.warns(
        UserWarning, match="multiplies these weights(.|\n)*w: at .*test_infer_axes.py"
    ):
        axes = wnjax.infer_axes(fn)({"w": w}, x)
    assert axes["w"] == wnjax.Weight((1,), operation="dot_general, masked")
    assert "dot_general, masked" in wnjax.summary(axes)
    axes = wnjax.infer_axes(fn, overrides={"w": -1})({"w": w}, x)  # no warning
    params = wnjax.weight_norm({"w": w * mask}, axes)
    np.testing.assert_allclose(params["w"].g, [[5**0.5, 5.0]], rtol=1e-6)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.sum((fn(wnjax.fold(p), x) - y) ** 2))(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert jnp.all(params["w"].v[mask == 0] == 0)
    assert jnp.all(params["w"].v[mask == 1] != w[mask == 1])


NEWER = {"log2", "one_minus_square"}  # than the oldest JAX that we support
OLDER = {"closed_call"}  # than the newest JAX


def test_every_rule_is_for_a_primitive_of_jax():
    """A rule under a name that JAX does not have, or has no more, would never be used."""
    names = {x.name for x in gc.get_objects() if isinstance(x, core.Primitive)}
    assert {"shard_map", *(key for key in RULES if isinstance(key, str))} - names <= NEWER | OLDER
    nested = {primitives.scan_p, primitives.while_p, primitives.cond_p, "shard_map"}
    assert not RULES.keys() & (nested | CALLS.keys() | {primitives.custom_jvp_call_p})


def test_a_primitive_of_somebody_else_is_not_taken_for_that_of_jax():
    transpose = core.Primitive("transpose")
    transpose.def_abstract_eval(lambda x: x)

    def fn(params, x):
        return x @ transpose.bind(params["w"])

    axes = wnjax.infer_axes(fn)({"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert axes["w"].reason == "unknown operation transpose"


class Lookup(nn.Module):
    """Everything that refuses a leaf, or uses one, happens in lines of Flax and JAX."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Embed(7, 4)(x))


def test_lines_are_those_of_the_user():
    model, x = Lookup(), jnp.array([1, 2])
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    axes = wnjax.infer_axes(lambda p, x: model.apply({"params": p}, x))(params, x)
    for leaf in (axes["Embed_0"]["embedding"], axes["Dense_0"]["bias"]):
        (line,) = leaf.lines
        assert "test_infer_axes.py:" in line
        assert line.endswith("(Lookup.__call__)")


def through_linear_transpose(w, x):
    return jax.linear_transpose(lambda y: y @ w, jnp.ones((2, 4), w.dtype))(x)[0]


def through_vjp(w, x):
    return jax.vjp(lambda y: y @ w, jnp.ones((2, 4), w.dtype))[1](x)[0]


def in_a_scope(w, x):
    with jax.named_scope("transpose(2,1)"):
        return x @ w.T


@pytest.mark.parametrize("fn", [through_linear_transpose, through_vjp, in_a_scope])
def test_a_weight_that_is_used_transposed_alone(fn):
    """Each output sums over the outputs of w."""
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 3))
    assert wnjax.infer_axes(lambda p, x: fn(p["w"], x))(params, x)["w"].feature_axes == (0,)
    tree = wnjax.weight_norm({"w": jnp.arange(12.0).reshape(4, 3)}, {"w": 0})
    wrapped = wnjax.wrap(lambda p, x: fn(p["w"], x))(tree, x)
    np.testing.assert_allclose(wrapped, x @ wnjax.fold(tree)["w"].T, rtol=1e-6)
    with pytest.raises(ValueError, match="gradients or new parameters"):
        wnjax.infer_axes(jax.grad(lambda p, x: fn(p["w"], x).sum()))(params, x)


STACK_AXES = {
    "two_layers": {},
    "dot_general_batch_axis": {"w": (2,)},
    "fused_qkv_stacked": {"w": (0,)},
    "conv_grouped": {},  # groups and outputs share an axis
    "conv_depthwise": {"kernel": (3,)},
    "conv_vmapped": {"w": (0,)},
    "attention_self": {},
    "experts_vmapped": {"kernel": (0,)},
    "moe_dense": {},  # all experts on the same data are one wider layer
    "moe_gather": {"w": (0,)},
    "moe_ragged_dot": {"w": (0,)},
    "scan_last_axis": {"w": (2,)},
    "scan_nested": {"w": (0, 1)},
    "remat_scan": {"Dense_0/kernel": (0, 1)},
    "python_loop": {"w": (0,)},
    "vmap_over_weights": {"w": (0,)},
}


@pytest.mark.parametrize("name", STACK_AXES)
def test_stack_axes(name):
    """Along these separate matrices lie: what a scan, a batch, a group or an index runs over."""
    fn, params, args = LAYERS[name].build()
    axes = jax.tree_util.tree_leaves_with_path(wnjax.infer_axes(fn)(params, *args))
    weights = {jax.tree_util.keystr(path, simple=True, separator="/"): w for path, w in axes}
    found = {path: w.stack_axes for path, w in weights.items() if isinstance(w, wnjax.Weight)}
    assert {path: stack for path, stack in found.items() if stack} == STACK_AXES[name]


def test_stack_axes_of_overrides_are_those_that_were_traced():
    fn, params, args = LAYERS["scan_nested"].build()
    axes = wnjax.infer_axes(fn, overrides={"w": (1, 3)})(params, *args)
    assert (axes["w"].feature_axes, axes["w"].stack_axes) == ((1, 3), (1,))
    assert "feature axes (1, 3), stack axes (1,)" in wnjax.summary(axes)
