"""Flax's naming rules, with the bias as a witness, against layers and against `infer_axes`."""

import re
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import wnjax
from tests.test_axes import gain_shapes


def tree(path, kernel, bias=None):
    """A kernel, and the bias beside it, among others."""
    module = {"kernel": jnp.ones(kernel)}
    if bias is not None:
        module["bias"] = jnp.ones(bias)
    for name in reversed(path.split("/")[:-1]):
        module = {name: module}
    return {"other": {"kernel": jnp.ones((2, 2))}} | module


def gain_shape(shape, features):
    return tuple(n if axis - len(shape) in features else 1 for axis, n in enumerate(shape))


@pytest.mark.parametrize(
    ("path", "kernel", "bias", "features"),
    [
        ("dense/kernel", (3, 4), (4,), {-1}),
        ("kernel", (3, 4), (4,), {-1}),
        # Stacks: the axis has the same place in both, counted from the front or from the end.
        ("dense/kernel", (5, 3, 4), (5, 4), {-3, -1}),
        ("dense/kernel", (5, 4, 4), (5, 4), {-3, -1}),
        ("dense/kernel", (3, 5, 4), (4, 5), {-2, -1}),
        ("dense/kernel", (3, 4, 5), (4, 5), {-2, -1}),
        ("dense/kernel", (2, 5, 3, 4), (2, 5, 4), {-4, -3, -1}),
        ("dense/kernel", (2, 2, 3, 4), (2, 2, 4), {-4, -3, -1}),
        ("query/kernel", (12, 7, 7), (12, 7), {-3, -1}),
        ("query/kernel", (12, 768, 12, 64), (12, 12, 64), {-4, -2, -1}),
        ("out/kernel", (12, 12, 64, 768), (12, 768), {-4, -1}),
        # Layers with several outputs.
        ("heads/kernel", (4, 2, 3), (2, 3), {-2, -1}),
        ("heads/kernel", (4, 5, 2, 3), (2, 3), {-2, -1}),
        # The name tells which of two the shapes mean.
        ("query/kernel", (4, 4, 4), (4, 4), {-2, -1}),
        # Convolutions, grouped and depthwise, and several inputs.
        ("conv/kernel", (3, 3, 8, 16), (16,), {-1}),
        ("conv/kernel", (3, 3, 1, 16), (16,), {-1}),
        ("conv/kernel", (16, 8, 16), (16,), {-1}),
        ("out/kernel", (2, 3, 4), (4,), {-1}),
        ("ConvTranspose_0/kernel", (3, 3, 8, 16), (16,), {-1}),
    ],
)
def test_the_bias_tells(path, kernel, bias, features):
    assert gain_shapes(tree(path, kernel, bias), None)[path] == gain_shape(kernel, features)


@pytest.mark.parametrize(
    ("path", "kernel", "bias", "line"),
    [
        ("up/kernel", (3, 3, 16, 8), (16,), "axes={'up/kernel': (-2,), ...}"),
        ("up/kernel", (3, 3, 8), (3,), "axes={'up/kernel': (-2,), ...}"),
        ("ups/kernel", (5, 3, 16, 8), (5, 16), "axes={'ups/kernel': (-4, -2), ...}"),
        ("turned/kernel", (4, 3), (4,), "axes={'turned/kernel': (-2,), ...}"),
        ("a.b/kernel", (4, 3), (4,), r"axes={'a\\.b/kernel': (-2,), ...}"),
        (
            "stack/kernel",
            (5, 5, 4),
            (5, 4),
            "axes={'stack/kernel': (-3, -1), ...} or axes={'stack/kernel': (-2, -1), ...}",
        ),
        ("dense/kernel", (3, 4), (7,), "axes={'dense/kernel': feature_axes, ...}"),
        ("dense/kernel", (3, 4), (), "axes={'dense/kernel': feature_axes, ...}"),
        ("dense/kernel", (3, 4), (3, 4), "axes={'dense/kernel': feature_axes, ...}"),
    ],
)
@pytest.mark.parametrize("form", ["weight_norm", "weight_normalized", "keep_norms"])
def test_a_bias_that_does_not_fit_is_refused_with_the_line_to_write(form, path, kernel, bias, line):
    params = tree(path, kernel, bias)
    text = f"  {path} of shape {kernel} beside a bias of shape {bias}: {line}"
    with pytest.raises(ValueError, match=f"infer_axes(?s:.*){re.escape(text)}$"):
        FORMS[form](params)


FORMS = {
    "weight_norm": wnjax.weight_norm,
    "weight_normalized": lambda params: wnjax.weight_normalized(optax.sgd(0.1)).init(params),
    "keep_norms": lambda params: wnjax.keep_norms().update(params, optax.EmptyState(), params),
}


@pytest.mark.parametrize(
    ("path", "kernel", "features"),
    [
        ("dense/kernel", (5, 3, 4), {-1}),
        ("Dense_0/kernel", (5, 3, 4), {-1}),
        ("conv/kernel", (3, 3, 2, 4), {-1}),
        ("kernel", (3, 3, 2, 4), {-1}),
        ("query/kernel", (5, 4, 2, 3), {-1}),
        ("my_query/kernel", (4, 2, 3), {-1}),
        ("value/kernel", (4, 2, 3, 5), {-1}),
        ("out/kernel", (5, 2, 3, 4), {-1}),
        ("ScanBlock_0/Conv_0/kernel", (5, 3, 2, 4), {-1}),
        ("VmapDense_0/query/kernel", (5, 3, 4), {-2, -1}),
        ("ConvTranspose_0/kernel", (3, 2, 4), {-1}),
    ],
)
def test_without_a_bias_and_a_telling_name_a_warning_tells_the_guess(path, kernel, features):
    axes = tuple(sorted(features))
    text = f"  {path} of shape {kernel}: axes={{{path!r}: {axes}, ...}}"
    with pytest.warns(UserWarning, match=f"infer_axes(?s:.*){re.escape(text)}$") as caught:
        shapes = gain_shapes(tree(path, kernel), None)
    assert shapes[path] == gain_shape(kernel, features)
    assert [warning.filename for warning in caught] == [gain_shapes.__code__.co_filename]


@pytest.mark.parametrize("form", FORMS)
def test_one_warning_names_all_guesses(form):
    params = {name: {"kernel": jnp.ones((2, 3, 4))} for name in ("a", "b")}
    with pytest.warns(UserWarning, match="a/kernel(?s:.*)b/kernel") as caught:
        FORMS[form](params)
    assert len(caught) == 1


def test_a_transposed_convolution_with_as_many_inputs_as_outputs_is_a_guess():
    for kernel, bias in (((3, 4, 4), (4,)), ((5, 3, 4, 4), (5, 4))):
        with pytest.warns(UserWarning, match=r"transpose_kernel=True(?s:.*)ConvTranspose_0/kernel"):
            wnjax.weight_norm(tree("ConvTranspose_0/kernel", kernel, bias))


@pytest.mark.parametrize(
    ("path", "kernel", "features"),
    [
        ("dense/kernel", (3, 4), {-1}),
        ("query/kernel", (4, 2, 3), {-2, -1}),
        ("key/kernel", (4, 2, 3), {-2, -1}),
        ("value/kernel", (4, 2, 3), {-2, -1}),
        ("value/kernel", (4, 3), {-1}),
        ("out/kernel", (2, 3, 4), {-1}),
        ("Conv_0/kernel", (3, 3, 2, 4), {-1}),
    ],
)
def test_names_that_tell_without_a_bias(path, kernel, features):
    assert gain_shapes(tree(path, kernel), None)[path] == gain_shape(kernel, features)


@pytest.mark.parametrize(
    "part",
    [
        lambda params: {"dense": {"kernel": params["dense"]["kernel"]}},
        lambda params: {"dense": params["dense"] | {"bias": optax.MaskedNode()}},
    ],
    ids=["cut", "masked"],
)
def test_a_part_that_lacks_the_bias_lacks_the_witness(part):
    params = tree("dense/kernel", (5, 3, 4), (5, 4))
    assert wnjax.weight_normalized(optax.sgd(0.1)).init(params).lengths["dense"][
        "kernel"
    ].shape == ((5, 1, 4))
    with pytest.warns(UserWarning, match="dense/kernel"):
        wnjax.weight_normalized(optax.sgd(0.1)).init(part(params))


class Scanned(nn.Module):
    """Five layers from 4 to 4."""

    axis: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        make = nn.scan(
            Layer, length=5, variable_axes={"params": self.axis}, split_rngs={"params": True}
        )
        return make(self.use_bias)(x, None)[0]


class Layer(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, use_bias=self.use_bias)(x), None


class Attended(nn.Module):
    """Three layers of attention, in a scan."""

    @nn.compact
    def __call__(self, x):
        make = nn.scan(
            Attention, length=3, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return make()(x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.MultiHeadDotProductAttention(num_heads=2)(x), None


def ensemble(module):
    """Five of a module, on the same input."""
    return nn.vmap(
        module, in_axes=None, axis_size=5, variable_axes={"params": 0}, split_rngs={"params": True}
    )


# name: (module, the shape of its input, whether the rules decide, refuse or guess)
LINEN = {
    "dense": (nn.Dense(4), (2, 3), "equal"),
    "dense_general": (nn.DenseGeneral((4, 5)), (2, 3), "equal"),
    "dense_general_of_two": (nn.DenseGeneral(4, axis=(-2, -1)), (2, 3, 5), "equal"),
    "dense_general_batched": (nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), (2, 3, 5), "equal"),
    "dense_general_square": (nn.DenseGeneral((4, 4)), (2, 4), "refused"),
    "conv": (nn.Conv(4, (3, 3)), (2, 5, 5, 3), "equal"),
    "depthwise": (nn.Conv(4, (3,), feature_group_count=2), (2, 5, 2), "equal"),
    "local": (nn.ConvLocal(4, (3,)), (2, 5, 3), "equal"),
    "transposed": (nn.ConvTranspose(4, (3,)), (2, 5, 3), "equal"),
    "turned": (nn.ConvTranspose(4, (3,), transpose_kernel=True), (2, 5, 3), "refused"),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2), (2, 3, 4), "equal"),
    "lstm": (nn.RNN(nn.LSTMCell(4)), (2, 5, 3), "equal"),
    "conv_lstm": (nn.RNN(nn.ConvLSTMCell(4, (3,))), (2, 5, 3, 2), "equal"),
    "einsum": (nn.Einsum((5, 3, 4), "...a,bac->...bc"), (2, 3), "equal"),
    "scan": (Scanned(0), (2, 4), "equal"),
    "scan_at_1": (Scanned(1), (2, 4), "equal"),
    "scan_at_the_end": (Scanned(-1), (2, 4), "refused"),
    "scan_without_a_bias": (Scanned(0, use_bias=False), (2, 4), "guessed"),
    "attention_in_scan": (Attended(), (2, 3, 4), "equal"),
    "vmap": (ensemble(nn.Dense)(4), (2, 3), "equal"),
    "conv_in_vmap": (ensemble(nn.Conv)(4, (3,)), (2, 5, 3), "equal"),
}


def stacked(layer, axis):
    """Five of an NNX layer, whose arrays have the axis of the stack at `axis`."""
    make = nnx.split_rngs(splits=5)(nnx.vmap(layer, out_axes=axis))
    return lambda rngs: Stack(make(rngs), axis)


class Stack(nnx.Module):
    def __init__(self, layers, axis):
        self.layers, self.axis = layers, axis

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axis, None))(self.layers, x)


NNX = {
    "linear": (partial(nnx.Linear, 3, 4), (2, 3), "equal"),
    "heads": (partial(nnx.LinearGeneral, 3, (4, 5)), (2, 3), "equal"),
    "conv": (partial(nnx.Conv, 3, 4, (3, 3)), (2, 5, 5, 3), "equal"),
    "conv_without_a_bias": (
        partial(nnx.Conv, 3, 4, (3, 3), use_bias=False),
        (2, 5, 5, 3),
        "guessed",
    ),
    "turned": (partial(nnx.ConvTranspose, 3, 4, (3,), transpose_kernel=True), (2, 5, 3), "refused"),
    "attention": (partial(nnx.MultiHeadAttention, 2, 4, decode=False), (2, 3, 4), "equal"),
    "lstm": (lambda rngs: nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs)), (2, 5, 3), "equal"),
    "vmap": (stacked(lambda rngs: nnx.Linear(3, 4, rngs=rngs), 0), (2, 3), "equal"),
    "vmap_at_1": (stacked(lambda rngs: nnx.Linear(3, 4, rngs=rngs), 1), (2, 3), "equal"),
    "conv_in_vmap": (stacked(lambda rngs: nnx.Conv(3, 4, (3,), rngs=rngs), 0), (2, 5, 3), "equal"),
}


def shapes_of_gv_leaves(params, axes=None):
    leaves = jax.tree_util.tree_leaves_with_path(wnjax.weight_norm(params, axes))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def check_against_tracing(fn, params, x, expected):
    axes = wnjax.infer_axes(fn)(params, x)
    if expected == "refused":
        with pytest.raises(ValueError, match="naming rules do not tell"):
            wnjax.weight_norm(params)
    elif expected == "guessed":
        with pytest.warns(UserWarning, match="naming rules guess"):
            wnjax.weight_norm(params)
    else:
        assert shapes_of_gv_leaves(params) == shapes_of_gv_leaves(params, axes)


@pytest.mark.parametrize("name", LINEN)
def test_linen_layers(name):
    module, shape, expected = LINEN[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    check_against_tracing(lambda p, x: module.apply({"params": p}, x), params, x, expected)


@pytest.mark.parametrize("name", NNX)
def test_nnx_layers(name):
    make, shape, expected = NNX[name]
    graph, params, rest = nnx.split(make(rngs=nnx.Rngs(0)), nnx.Param, ...)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    check_against_tracing(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x, expected)


def dense(kernel, bias, x):
    return jnp.tensordot(x, kernel, x.ndim - 1) + bias


def conv(kernel, bias, x, is_turned=False):
    numbers = ("NWC", "WOI" if is_turned else "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers) + bias


@st.composite
def stacks(draw):
    """A name, the shapes of a kernel, a bias and an input, and the function: 0 to 2 stacks."""
    size = st.integers(2, 6)
    sizes = st.lists(size, min_size=1, max_size=2)
    kind = draw(st.sampled_from(["dense", "conv", "turned"]))
    if kind == "dense":
        inputs, bias, fn = draw(sizes), draw(sizes), dense
        kernel, x = [*inputs, *bias], [2, *inputs]
    else:
        taps, inputs, outputs = draw(size), draw(size), draw(size)
        is_turned = kind == "turned"
        fn = partial(conv, is_turned=is_turned)
        bias, x = [outputs], [2, 5, inputs]
        kernel = [taps, outputs, inputs] if is_turned else [taps, inputs, outputs]
    for _ in range(draw(st.integers(0, 2))):
        count, place = draw(size), draw(st.integers(-len(bias) - 1, len(bias)))
        kernel, bias = inserted(kernel, place, count), inserted(bias, place, count)
        fn = jax.vmap(fn, in_axes=(place, place, None))
    names = {
        "dense": ["layer", "Dense_0"],
        "conv": ["layer", "Conv_0"],
        "turned": ["ConvTranspose_0"],
    }
    can_be_told = kind == "turned" and len({*kernel}) == len(kernel)
    name = draw(st.sampled_from([*names[kind], *["layer"] * can_be_told]))
    return name, kernel, bias, x, fn


def inserted(sizes, place, size):
    """The sizes with one more, that has the given place among them."""
    place %= len(sizes) + 1
    return [*sizes[:place], size, *sizes[place:]]


@settings(max_examples=200, deadline=None)
@given(stacks())
def test_the_rules_never_disagree_silently_with_tracing(stack):
    name, kernel, bias, x, fn = stack
    params = {
        name: {
            "kernel": jax.ShapeDtypeStruct(kernel, jnp.float32),
            "bias": jax.ShapeDtypeStruct(bias, jnp.float32),
        }
    }
    x = jax.ShapeDtypeStruct(x, jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        axes = wnjax.infer_axes(lambda p, x: fn(p[name]["kernel"], p[name]["bias"], x))(params, x)
    try:
        found = shapes_of_gv_leaves(params)
    except (ValueError, UserWarning):  # refused, or told to be a guess
        return
    assert found == shapes_of_gv_leaves(params, axes)
