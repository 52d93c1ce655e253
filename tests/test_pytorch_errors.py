"""Every error of a bad checkpoint: what is wrong, where, and what to do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnjax
from tests.test_pytorch import array, checkpoint, message, variables
from wnjax.pytorch import Layout, Part, from_state_dict, to_state_dict


def test_all_that_is_missing_and_unexpected_at_once():
    state = checkpoint()
    state["headd.weight"] = state.pop("head.bias")
    state["extra.weight_g"] = array(1)
    del state["norm.running_var"]
    state["conv.bias"] = array(5)
    assert message(state, variables()) == (
        "the state dict does not fit the template\n"
        "leaves of the template that the state dict lacks (leaf: name):\n"
        "  batch_stats/norm/var: norm.running_var\n"
        "  params/head/bias: head.bias\n"
        "names in the state dict that no leaf takes (names or ignore may tell):\n"
        "  extra.weight_g\n"
        "  headd.weight\n"
        "leaves that do not fit:\n"
        "  params/conv/bias: conv.bias has shape (5,), but the leaf of shape (4,), in the "
        "layout 'same', needs (4,)"
    )


def test_wrong_shape():
    text = message({"weight": array(3, 5)}, {"kernel": jnp.zeros((4, 3))})
    assert text.endswith(
        "kernel: weight has shape (3, 5), but the leaf of shape (4, 3), in the layout "
        "'linear', needs (3, 4)"
    )


def test_transposed_without_being_told():
    """A ConvTranspose, and a linear layer that keeps its inputs first."""
    state = {"weight_g": array(6, 1, 1), "weight_v": array(6, 4, 3)}
    template = {"kernel": jnp.zeros((3, 6, 4))}
    assert (
        "weight_v has shape (6, 4, 3), but the leaf of shape (3, 6, 4), in the layout 'conv', "
        "needs (4, 6, 3). It would fit as 'conv_transpose': if that is what it is, say so in "
        "layouts"
    ) in message(state, template)
    from_state_dict(state, template, layouts={"kernel": "conv_transpose"})
    text = message({"weight": array(4, 3)}, {"kernel": jnp.zeros((4, 3))})
    assert "It would fit as 'same'" in text


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1), (4, 1), (4, 2, 1), (4, 2, 3), (3, 1, 1)])
def test_gains_of_a_shape_that_pytorch_takes_silently(shape):
    state = checkpoint() | {"conv.weight_g": array(*shape)}
    assert (
        f"params/conv/kernel: conv.weight_g of shape {shape} does not fit conv.weight_v of "
        "shape (4, 2, 3): give it the size of one axis, dim, and size 1 on the others"
    ) in message(state, variables())


@pytest.mark.parametrize(
    ("lacking", "there"),
    [
        ("conv.weight_g", "conv.weight_v"),
        ("conv.weight_v", "conv.weight_g"),
        (
            "head.parametrizations.weight.original0",
            "head.parametrizations.weight.original1",
        ),
    ],
)
def test_g_or_v_is_missing(lacking, there):
    state = checkpoint()
    del state[lacking]
    assert f"{there} is there without {lacking}" in message(state, variables())


def test_one_weight_in_two_forms():
    state = checkpoint() | {
        "conv.weight": array(4, 2, 3),
        "head.weight_g": array(3, 1),
        "head.weight_v": array(3, 4),
    }
    text = message(state, variables())
    assert (
        "conv.weight is there in 2 forms: conv.weight, conv.weight_g, conv.weight_v. Keep"
    ) in text
    assert (
        "head.weight is there in 2 forms: head.parametrizations.weight.original0, "
        "head.parametrizations.weight.original1, head.weight_g, head.weight_v. Keep one"
    ) in text


def test_one_weight_whose_name_looks_like_g_or_v_of_another():
    state = {"bias": array(2), "bias_v": array(2)}
    tree = from_state_dict(state, {"bias": jnp.zeros(2), "bias_v": jnp.zeros(2)})
    chex.assert_trees_all_equal(tree, state)


def test_spectral_norm():
    state = {"weight_orig": array(2, 3), "weight_u": array(2), "weight_v": array(3)}
    text = message(state, {"kernel": jnp.zeros((3, 2))})
    assert "weight_v is there without weight_g. This is spectral norm: remove it in" in text


@pytest.mark.parametrize("prefix", ["", "generator"])
def test_a_prefix_that_was_forgotten(prefix):
    state = {f"generator.{name}": x for name, x in checkpoint().items()}
    hint = "what is missing seems to be there with prefix='generator.'"
    assert message(state, variables(), prefix=prefix).endswith(hint)


@pytest.mark.parametrize("prefix", ["", "gen"])
def test_a_forgotten_prefix_needs_no_listing(prefix):
    """Of a checkpoint with all names under it, and another model's beside them."""
    state = {f"generator.{name}": x for name, x in checkpoint().items()}
    state |= {f"generator_d.{i}.weight": array(1) for i in range(100)}
    assert message(state, variables(), prefix=prefix) == (
        "the state dict does not fit the template\n"
        "leaves of the template that the state dict lacks (leaf: name):\n"
        "  9, such as batch_stats/norm/mean: norm.running_mean\n"
        "names in the state dict that no leaf takes (names or ignore may tell):\n"
        "  111, such as generator.conv.bias\n"
        "what is missing seems to be there with prefix='generator.'"
    )
    text = message(state, variables(), prefix=prefix, ignore=".*")
    assert "that no leaf takes" not in text


def test_a_prefix_is_not_made_up():
    """Of a leaf that is truly missing, or of one in many."""
    state = checkpoint() | {"more.conv.weight": array(4, 2, 3), "more.x": array(1)}
    del state["conv.weight_g"], state["conv.weight_v"], state["norm.weight"], state["table.weight"]
    text = message(state, variables())
    assert "prefix" not in text
    assert "\n  params/norm/scale: norm.weight\n" in text
    assert "\n  more.x" in text


def test_ignored_patterns_that_match_nothing():
    with pytest.raises(ValueError, match=r"ignore: the pattern 'hed.*' matches no name of the "):
        from_state_dict(checkpoint(), variables(), ignore=["norm.*", "hed.*"])
    for pattern in (3, "("):
        with pytest.raises(ValueError, match=r"ignore: .* is not a regular expression"):
            from_state_dict(checkpoint(), variables(), ignore=[pattern])
    # What is counted, taken by a leaf, or under another prefix is there.
    state = {f"a.{name}": x for name, x in checkpoint().items()} | {"b.x": array(1)}
    ignore = [r".*num_batches_tracked", r"a\.conv\.bias", r"b\..*"]
    from_state_dict(state, variables(), prefix="a.", ignore=ignore)


def test_what_is_no_state_dict():
    class Module:
        def state_dict(self):
            return checkpoint()

    for fn in (from_state_dict, lambda module, tree: to_state_dict(tree, like=module)):
        with pytest.raises(
            TypeError, match=r"got a Module\. Pass what its \.state_dict\(\) returns"
        ):
            fn(Module(), {"bias": jnp.zeros(1)})
        for kind, load in (("safetensors", "numpy.load_file"), ("bin", "torch.load")):
            text = rf"model\.{kind}\.index\.json lists the files .*{load}\(file"
            with pytest.raises(ValueError, match=text):
                fn(f"a/model.{kind}.index.json", {"bias": jnp.zeros(1)})


@pytest.mark.parametrize(
    "value",
    [np.array(["a"], object), np.array(["a"]), np.array([1.5], object), np.zeros(1, "M8[s]")],
)
def test_arrays_of_no_numbers(value):
    text = rf"bias.* is an array of {value.dtype}, not of numbers".replace("[", r"\[")
    with pytest.raises(TypeError, match=text):
        from_state_dict({"bias": value}, {"bias": jnp.zeros(1)})
    with pytest.raises(TypeError, match=text):
        to_state_dict({"bias": value})


def test_random_keys_are_no_numbers():
    with pytest.raises(TypeError, match=r"key is an array of key<fry>, not of numbers"):
        to_state_dict({"key": jax.random.key(0)})


def test_complex_values_do_not_become_real():
    assert "bias is complex64, and the template's float32 does not hold its values" in message(
        {"bias": np.array([1 + 1j], np.complex64)}, {"bias": jnp.zeros(1)}
    )


def test_tensors_that_numpy_cannot_hold():
    torch = pytest.importorskip("torch", reason="this is about its tensors")
    tensors = torch.ones(1).to_sparse(), torch.ones(1, device="meta")
    for tensor in (*tensors, torch.ones(1).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="bias in the state dict does not become a numpy array"):
            from_state_dict({"bias": tensor}, {"bias": jnp.zeros(1)})
    with pytest.raises(TypeError, match=r"got a Linear\. Pass what its \.state_dict"):
        from_state_dict(torch.nn.Linear(1, 1), {"bias": jnp.zeros(1)})


def test_names_that_are_no_text():
    state, template = {"bias": array(1)}, {"bias": jnp.zeros(1)}
    for name in (3, ("bias", 3)):
        with pytest.raises(TypeError, match="Part: name must be a string or a tuple of strings"):
            Part(name)
    for index, count in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"Part: there is no part {index} of {count}"):
            Part("bias", index, count)
    for fn in (
        lambda **kw: from_state_dict(state, template, **kw),
        lambda **kw: to_state_dict(template, **kw),
    ):
        with pytest.raises(TypeError, match="prefix must be a string, got None"):
            fn(prefix=None)
        with pytest.raises(TypeError, match="names: bias must be given a string, a Part or None"):
            fn(names=lambda path: 3)
        with pytest.raises(ValueError, match="names: 3 is not a regular expression"):
            fn(names={3: "bias"})
        with pytest.raises(ValueError, match=r"bias: \['same'\] is no layout"):
            fn(layouts={"bias": ["same"]})


def test_what_is_ignored_is_named_as_it_is_reported():
    state = {"a.bias": array(2), "a.more": array(2)}
    template = {"bias": jnp.zeros(2)}
    assert "\n  a.more" in message(state, template, prefix="a.")
    from_state_dict(state, template, prefix="a.", ignore=r"a\.more")


def test_transposed_convolutions_of_which_nothing_is_said():
    """Their kernel would fit, if it has as many inputs as outputs, and be wrong."""
    template = {"ConvTranspose_0": {"kernel": jnp.zeros((3, 4, 4))}}
    state = {"ConvTranspose_0.weight": array(4, 4, 3)}
    with pytest.raises(ValueError, match=r"ConvTranspose_0/kernel is the kernel of a transposed"):
        from_state_dict(state, template)
    for layout in ("conv", "conv_transpose"):
        from_state_dict(state, template, layouts={".*/kernel": layout})


def test_templates_that_hold_no_arrays():
    assert "bias: the template has a float there" in message({"bias": array()}, {"bias": 0.5})
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(TypeError, match="kernel is a ShapeDtypeStruct, no array"):
        to_state_dict(shapes)


def test_the_state_of_an_nnx_module_with_gains():
    state = nnx.state(wnjax.nnx.WeightNorm(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    for fn in (to_state_dict, lambda state: from_state_dict({}, state)):
        with pytest.raises(ValueError, match=r"take its normalized\(\)"):
            fn(state)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_gains_in_half_precision(dtype):
    state = checkpoint()
    for name in ("conv.weight_g", "conv.weight_v"):
        state[name] = state[name].astype(dtype)
    assert (
        f"conv.weight_g is {np.dtype(dtype)}, and every rounding of g changes a neuron's "
        "length. Save the model before .half(), or pass half_gains=True"
    ) in message(state, variables())
    gv = from_state_dict(state, variables(), half_gains=True)["params"]["conv"]["kernel"]
    assert gv.g.dtype == gv.v.dtype == jnp.float32
    np.testing.assert_array_equal(gv.g.ravel(), state["conv.weight_g"].ravel())


def test_values_that_the_template_cannot_hold():
    state = checkpoint()
    state["conv.bias"] = state["conv.bias"].astype(np.float64)  # holds float32 values
    state["head.bias"] = np.full(3, 0.1)
    state["norm.bias"] = np.ones(4, np.int32)
    text = message(state, variables())
    assert "conv/bias" not in text
    assert "head/bias: head.bias is float64, and the template's float32 does not hold" in text
    assert "norm/bias: norm.bias is int32, and the template's float32 does not hold" in text


def test_prefixes_that_nothing_has():
    with pytest.raises(ValueError, match=r"begins with the prefix 'module\.'; they begin like c"):
        from_state_dict(checkpoint(), variables(), prefix="module.")


@pytest.mark.parametrize("rules", [{"names": {"cnv": ""}}, {"layouts": {"cnv": "same"}}])
def test_patterns_that_match_nothing(rules):
    (argument,) = rules
    with pytest.raises(ValueError, match=f"{argument}: the pattern 'cnv' matches no leaf"):
        from_state_dict(checkpoint(), variables(), **rules)


def test_names_and_layouts_that_are_none():
    with pytest.raises(TypeError, match="names: kernel must be given a string, a Part or None"):
        from_state_dict({}, {"kernel": jnp.zeros((2, 3))}, {"kernel": 3})
    for layout, error in {
        "convolution": r"kernel: 'convolution' is no layout; choose from linear, heads, conv",
        "conv": r"kernel has 2 axes, 'conv' needs 3 or more",
        Layout(((0,),)): r"kernel has 2 axes, .* is for 1",
    }.items():
        with pytest.raises(ValueError, match=error):
            from_state_dict({}, {"kernel": jnp.zeros((2, 3))}, layouts={"kernel": layout})
