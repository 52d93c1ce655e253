"""Kernels with as many inputs as outputs: the model tells their order of axes, or they are refused.

That what it tells is right is compared with PyTorch, in the modules' file.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnjax
from tests.golden import torch_modules
from tests.test_pytorch import array, message
from tests.test_pytorch_modules import MODELS, NNX_MODELS, channels_last
from tests.vocoders import CODEC_LAYOUTS
from wnjax.pytorch import Layout, from_state_dict, infer_layouts, to_state_dict

# Groups that PyTorch keeps apart lie in two axes of the equation's kernel, or in none.
GROUPED = [case for case in MODELS if case.startswith("conv_transpose") and "groups" in case]


@pytest.mark.parametrize("case", sorted(set(MODELS) - {*GROUPED}))
def test_equations_tell_what_the_layouts_did(case):
    """Of strided and unstrided, grouped and transposed convolutions, and of attention."""
    record = torch_modules.recorded(case, "weight_g")
    module, names, layouts = MODELS[case]
    x = channels_last(record["call"]["x"])
    template = jax.eval_shape(module.init, jax.random.key(0), x)
    inferred = infer_layouts(module.apply)(template, x)
    own = CODEC_LAYOUTS if case == "codec" else {}
    tree = from_state_dict(record["state"], template, names, layouts=own | inferred)
    expected = from_state_dict(record["state"], template, names, layouts=layouts)
    chex.assert_trees_all_equal(tree, expected)


@pytest.mark.parametrize("case", NNX_MODELS)
def test_equations_and_modules_tell_the_same(case):
    record = torch_modules.recorded(case, "weight_g")
    make, names, layouts = NNX_MODELS[case]
    model = make(nnx.Rngs(0))
    graph, template = nnx.split(model)
    x = channels_last(record["call"]["x"])
    inferred = infer_layouts(lambda p, x: nnx.merge(graph, p)(x))(template, x)
    tree = from_state_dict(
        record["state"], template, names, layouts=(layouts or {}) | dict(inferred)
    )
    expected = from_state_dict(record["state"], template, names, layouts=layouts, model=model)
    chex.assert_trees_all_equal(tree, expected)


class Stack(nn.Module):
    """Square kernels in a loop, in remat, and with weight norm of Flax's own."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.ConvTranspose)(4, (3,), transpose_kernel=True, name="a")(x)
        x = nn.WeightNorm(nn.ConvTranspose(4, (3,), (2,), name="b"), name="n")(x)
        return nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})(
            4, (3,), name="c"
        )(x[None].repeat(2, 0))


def test_equations_through_transformations():
    """A stack is no kernel of PyTorch's: nothing is told of it."""
    x = jnp.ones((1, 8, 4))
    params = jax.eval_shape(Stack().init, jax.random.key(0), x)
    assert infer_layouts(Stack().apply)(params, x) == {
        "a/kernel": "conv",
        "b/kernel": "conv_transpose",
    }


def conv(x, w, **kwargs):
    return jax.lax.conv_general_dilated(
        x, w, (1,), [(2, 2)], dimension_numbers=("NWC", "WIO", "NWC"), **kwargs
    )


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda p, x: conv(x, p["w"]), "conv"),
        (lambda p, x: conv(x, p["w"].transpose(2, 0, 1)), Layout(((1,), (0,), (2,)))),
        (lambda p, x: conv(x, p["w"], lhs_dilation=(2,)), "conv_transpose"),
        (lambda p, x: conv(x, p["w"][::-1].swapaxes(1, 2), lhs_dilation=(2,)), "conv"),
        (lambda p, x: jax.lax.conv_transpose(x, p["w"], (1,), "SAME"), "conv_transpose"),
        (
            lambda p, x: jax.lax.conv_transpose(x, p["w"], (1,), "SAME", transpose_kernel=True),
            "conv",
        ),
        # A kernel in reverse may be either; in two roles it is none; a part is not the whole.
        (lambda p, x: conv(x, p["w"][::-1]), None),
        (lambda p, x: conv(conv(x, p["w"]), p["w"], lhs_dilation=(2,)), None),
        (lambda p, x: conv(x, p["w"][1:]), None),
        (lambda p, x: jnp.einsum("nwi,kio->nwko", x, p["w"]), None),
        # The derivative of a convolution is a transposed one of the same kernel.
        (lambda p, x: jax.grad(lambda x: (conv(x, p["w"]) ** 2).sum())(x), "conv"),
    ],
)
def test_equations_of_ones_own(fn, expected):
    params = {"w": jax.ShapeDtypeStruct((4, 4, 4), jnp.float32)}
    inferred = infer_layouts(fn)(params, jnp.ones((1, 8, 4)))
    assert inferred == ({} if expected is None else {"w": expected})


def square(path):
    state = {f"{path.replace('/', '.')}.weight": array(4, 4, 3)}
    return {path.split("/")[0]: {path.split("/")[1]: {"kernel": jnp.zeros((3, 4, 4))}}}, state


def test_square_kernels_of_which_nothing_is_told_are_refused():
    """Both ways, all at once, and once each; a kernel that is not asked for is not refused."""
    state = {f"blocks.{i}.weight": array(4, 4, 3) for i in range(12)}
    template = {"blocks": {i: {"kernel": jnp.zeros((3, 4, 4))} for i in range(12)}}
    text = message(state | {"more": array(1)}, template)
    assert (
        "kernels with as many inputs as outputs, or beside a bias of several axes, and "
        "nothing tells whether they are those of a convolution, of a transposed one, or of several "
        "heads:\n  blocks/0/kernel\n"
    ) in text
    assert text.count("blocks/0") == 1
    assert "... and 4 more\nThe whole model tells it at once: model=, an nnx.Module, or " in text
    assert "layouts=wnjax.pytorch.infer_layouts(fn)(params, x)" in text
    assert "\n  more" in text
    with pytest.raises(ValueError, match=r"nothing tells whether .*\n  blocks/0/kernel\n"):
        to_state_dict(template)
    layouts = {r".*kernel": "conv"}
    back = to_state_dict(from_state_dict(state, template, layouts=layouts), layouts=layouts)
    chex.assert_trees_all_equal(back, state)
    assert to_state_dict(template, {".*": None}) == {}
    chex.assert_trees_all_equal(from_state_dict({}, template, {".*": None}), template)


@pytest.mark.parametrize("path", ["block/Conv_0", "ConvTransposeBlock_0/Conv_12"])
def test_names_that_linen_gives_tell(path):
    template, state = square(path)
    tree = from_state_dict(state, template)
    chex.assert_trees_all_equal(to_state_dict(tree), state)


@pytest.mark.parametrize("path", ["block/conv", "block/Conv", "Conv_0/up", "block/Conv_up"])
def test_names_of_ones_own_do_not(path):
    template, state = square(path)
    assert "nothing tells" in message(state, template)


def test_kernels_that_are_the_same_either_way():
    template = {"a": {"kernel": jnp.zeros((3, 2, 4))}, "b": {"kernel": jnp.zeros((1, 1, 1))}}
    state = {"a.weight": array(4, 2, 3), "b.weight": array(1, 1, 1)}
    chex.assert_trees_all_equal(to_state_dict(from_state_dict(state, template)), state)


class Shared(nnx.Module):
    """One layer in two places, a stack, and layers whose kernels no PyTorch layer has so."""

    def __init__(self, rngs):
        self.b = nnx.ConvTranspose(4, 4, 3, rngs=rngs)
        self.a = nnx.List([self.b, nnx.Conv(4, 4, 3, rngs=rngs)])
        self.stack = nnx.vmap(lambda rngs: nnx.Conv(4, 4, 3, rngs=rngs))(rngs.split(2))
        self.linear = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
        self.experts = nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs)


def test_modules_of_nnx():
    model = Shared(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    pytorch = {
        "a.0.weight": array(4, 4, 3),
        "a.1.weight": array(4, 4, 3),
        "linear.weight": array(20, 6),
    }
    names = {r"(a/\d|linear)/kernel": r"\g<0>", ".*": None}
    tree = from_state_dict(pytorch, state, names, model=model)
    layouts = {"a/0/kernel": "conv_transpose", "a/1/kernel": "conv"}
    layouts["linear/kernel"] = Layout(((2, 3), (0, 1)))
    expected = from_state_dict(pytorch, state, names, layouts=layouts)
    chex.assert_trees_all_equal(tree, expected)
    back = to_state_dict(tree, names, model=model)
    chex.assert_trees_all_equal(back, pytorch)
    names = {"(stack|experts)/kernel": r"\g<0>", ".*": None}
    with pytest.raises(ValueError, match=r"nothing tells .*\n  experts/kernel\n  stack/kernel\n"):
        to_state_dict(tree, names, model=model)
    own = {"a/0/kernel": "conv"}
    tree = from_state_dict(
        {"a.0.weight": pytorch["a.0.weight"]},
        state,
        {"a/0/kernel": "a.0.weight", ".*": None},
        layouts=own,
        model=model,
    )
    np.testing.assert_array_equal(tree["a"][0]["kernel"][...], array(4, 4, 3).transpose(2, 1, 0))


def test_models_that_are_none():
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module, got a Conv\. Of a Linen"):
        from_state_dict({}, {}, model=nn.Conv(3, (3,)))
    model = Shared(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"model: the tree has none of its kernels.*\n  a/0/kernel"
    ):
        to_state_dict({"generator": nnx.state(model, nnx.Param)}, model=model)
    with pytest.raises(ValueError, match=r"ConvTranspose_0/kernel is .*infer_layouts"):
        to_state_dict({"ConvTranspose_0": {"kernel": jnp.zeros((3, 4, 4))}})


LAYOUTS = [
    ((5,), (1, 5, 1), "channels1d"),
    ((5,), (1, 5, 1, 1), "channels2d"),
    ((3, 5), (5, 3, 1), "pointwise1d"),
    ((3, 5), (5, 3, 1, 1), "pointwise2d"),
    ((3, 3), (3, 3, 1, 1, 1), "pointwise3d"),
    ((), (1,), "scalar"),
]


@pytest.mark.parametrize(("shape", "torch_shape", "layout"), LAYOUTS)
def test_layouts_that_errors_propose(shape, torch_shape, layout):
    """And that do what they are proposed for, as `Layout`s spelled out did, both ways."""
    template, state = {"w": {"kernel": jnp.zeros(shape)}}, {"w.weight": array(*torch_shape)}
    assert f"It would fit as {layout!r}: if that is what it is, say so" in message(state, template)
    tree = from_state_dict(state, template, layouts={"w/kernel": layout})
    np.testing.assert_array_equal(tree["w"]["kernel"], state["w.weight"].reshape(shape[::-1]).T)
    chex.assert_trees_all_equal(to_state_dict(tree, layouts={"w/kernel": layout}), state)


def test_layouts_of_another_number_of_axes():
    template = {"kernel": jnp.zeros((3, 4, 5))}
    for layout, needs in (("scalar", 0), ("channels1d", 1), ("pointwise2d", 2)):
        with pytest.raises(ValueError, match=f"kernel has 3 axes, '{layout}' needs {needs}$"):
            to_state_dict(template, layouts={"kernel": layout})


def test_a_normalized_convolution_with_one_tap_is_a_dense_layer():
    state = {"weight_g": array(5, 1, 1), "weight_v": array(5, 3, 1)}
    tree = from_state_dict(state, {"kernel": jnp.zeros((3, 5))}, layouts={"kernel": "pointwise1d"})
    assert tree["kernel"].g.shape == (1, 5)
    w = state["weight_v"] * state["weight_g"]
    w /= np.linalg.norm(state["weight_v"], axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(wnjax.fold(tree)["kernel"], w[:, :, 0].T, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kernel", "bias"),
    [("dense", (5, 3, 4), (5, 4)), ("heads", (4, 2, 3), (2, 3)), ("query", (5, 3, 4), (5, 4))],
)
def test_a_bias_of_several_axes_shows_that_a_kernel_is_no_convolution(name, kernel, bias):
    tree = {name: {"kernel": jnp.zeros(kernel), "bias": jnp.zeros(bias)}}
    with pytest.raises(
        ValueError, match=rf"bias of several axes.* nothing tells .*\n  {name}/kernel"
    ):
        to_state_dict(tree)
    state = to_state_dict(tree, layouts={f"{name}/kernel": "heads"})
    assert state[f"{name}.weight"].shape == (kernel[1] * kernel[2], kernel[0])
