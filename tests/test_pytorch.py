"""State dicts in and out: keys, layouts, boxes, and what is refused. Modules: the other file."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from safetensors.flax import save_file
from safetensors.numpy import save_file as save_numpy

import wnjax
from wnjax.pytorch import Layout, from_state_dict, to_state_dict
from wnjax.pytorch._layouts import NAMED

P = jax.P


def array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def checkpoint():
    """A convolution in the older style, a linear layer in the newer one, a norm, a table."""
    return {
        "conv.weight_g": array(4, 1, 1),
        "conv.weight_v": array(4, 2, 3),
        "conv.bias": array(4),
        "head.parametrizations.weight.original0": array(3, 1),
        "head.parametrizations.weight.original1": array(3, 4),
        "head.bias": array(3),
        "norm.weight": array(4),
        "norm.bias": array(4),
        "norm.running_mean": array(4),
        "norm.running_var": array(4) ** 2,
        "norm.num_batches_tracked": np.array(7),
        "table.weight": array(5, 2),
    }


def variables():
    """The Flax tree for it, as shapes."""
    shapes = {
        "params": {
            "conv": {"kernel": (3, 2, 4), "bias": (4,)},
            "head": {"kernel": (4, 3), "bias": (3,)},
            "norm": {"scale": (4,), "bias": (4,)},
            "table": {"embedding": (5, 2)},
        },
        "batch_stats": {"norm": {"mean": (4,), "var": (4,)}},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def message(state_dict, template, *args, **kwargs):
    """What from_state_dict says against it."""
    with pytest.raises(ValueError, match="does not fit the template") as raised:
        from_state_dict(state_dict, template, *args, **kwargs)
    return str(raised.value)


def test_every_array_comes_to_its_place():
    state = checkpoint()
    tree = from_state_dict(state, variables())
    conv, head = tree["params"]["conv"], tree["params"]["head"]
    np.testing.assert_array_equal(conv["kernel"].v, state["conv.weight_v"].transpose(2, 1, 0))
    np.testing.assert_array_equal(conv["kernel"].g, state["conv.weight_g"].transpose(2, 1, 0))
    newer = "head.parametrizations.weight.original"
    np.testing.assert_array_equal(head["kernel"].v, state[f"{newer}1"].T)
    np.testing.assert_array_equal(head["kernel"].g, state[f"{newer}0"].T)
    np.testing.assert_array_equal(tree["params"]["norm"]["scale"], state["norm.weight"])
    np.testing.assert_array_equal(tree["batch_stats"]["norm"]["mean"], state["norm.running_mean"])
    np.testing.assert_array_equal(tree["batch_stats"]["norm"]["var"], state["norm.running_var"])
    np.testing.assert_array_equal(tree["params"]["table"]["embedding"], state["table.weight"])
    assert jax.tree.structure(wnjax.fold(tree)) == jax.tree.structure(variables())


@pytest.mark.parametrize("style", ["weight_g", "parametrizations"])
def test_the_way_back_writes_one_style_bit_for_bit(style):
    state = checkpoint()
    back = to_state_dict(from_state_dict(state, variables()), style=style)
    again = from_state_dict(back, variables())
    chex.assert_trees_all_equal(again, from_state_dict(state, variables()))
    assert sum(name.endswith(("_g", "original0")) for name in back) == 2
    assert ("conv.weight_g" in back) == ("head.weight_g" in back) == (style == "weight_g")
    for name in back.keys() & state.keys():
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)


def test_names_by_rules_by_a_function_and_prefixes():
    state = {f"module.net.0.{k}": x for k, x in {"weight": array(3, 2), "bias": array(3)}.items()}
    state["other.weight"] = array(1)
    template = {"first_0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    rules = {r"first_(\d)/(.*)": r"net.\1.\2"}
    by_rules = from_state_dict(state, template, rules, prefix="module.")
    by_function = from_state_dict(
        state,
        template,
        {
            "first_0/kernel": "module.net.0.weight",
            "first_0/bias": "module.net.0.bias",
        }.get,
        ignore=[r"other\..*"],
    )
    chex.assert_trees_all_equal(by_rules, by_function)
    np.testing.assert_array_equal(by_rules["first_0"]["kernel"], state["module.net.0.weight"].T)
    back = to_state_dict(by_rules, rules, prefix="module.")
    assert back.keys() == state.keys() - {"other.weight"}


def test_a_leaf_without_a_name_keeps_its_value():
    template = {"kernel": jnp.zeros((2, 3)), "temperature": jnp.ones(())}
    state = {"weight": array(3, 2)}
    tree = from_state_dict(state, template, {"temperature": None})
    assert tree["temperature"] == 1
    assert to_state_dict(tree, {"temperature": None}).keys() == {"weight"}
    template["temperature"] = jax.ShapeDtypeStruct((), jnp.float32)
    assert "temperature: no value" in message(state, template, {"temperature": None})


def test_any_parameter_may_be_normalized():
    """And its name may be any."""
    state = {"alpha_g": array(1, 3), "alpha_v": array(2, 3)}
    gv = from_state_dict(state, {"alpha": jnp.zeros((2, 3))})["alpha"]
    np.testing.assert_array_equal(gv.v, state["alpha_v"])
    np.testing.assert_array_equal(gv.g, state["alpha_g"])


def test_attention_splits_heads():
    template = {
        "query": {"kernel": jnp.zeros((6, 2, 3)), "bias": jnp.zeros((2, 3))},
        "out": {"kernel": jnp.zeros((2, 3, 6)), "bias": jnp.zeros(6)},
    }
    state = {
        "query.weight_g": array(6, 1),
        "query.weight_v": array(6, 6, seed=1),
        "query.bias": array(6, seed=2),
        "out.weight_g": array(6, 1, seed=3),
        "out.weight_v": array(6, 6, seed=4),
        "out.bias": array(6, seed=5),
    }
    layouts = {"out/kernel": "linear"}
    tree = from_state_dict(state, template, layouts=layouts)
    x = array(5, 6)
    plain = jax.tree.map(np.asarray, wnjax.fold(tree))
    heads = np.einsum("bi,ihd->bhd", x, plain["query"]["kernel"]) + plain["query"]["bias"]
    y = np.einsum("bhd,hdo->bo", heads, plain["out"]["kernel"]) + plain["out"]["bias"]

    def linear(x, name):
        g, v = state[f"{name}.weight_g"], state[f"{name}.weight_v"]
        w = g * v / np.linalg.norm(v, axis=1, keepdims=True)
        return x @ w.T + state[f"{name}.bias"]

    np.testing.assert_allclose(y, linear(linear(x, "query"), "out"), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(to_state_dict(tree, layouts=layouts, style="weight_g"), state)


def test_own_layouts():
    """Snake's alpha, (1, channels, 1); a PReLU; a convolution of one tap as a Dense layer."""
    layouts = {
        "long": Layout(((0,), (2,), (1,))),
        "short": Layout(((), (0,), ())),
        "slope": Layout(((),)),
        "kernel": Layout(((1,), (0,), ())),
    }
    state = {
        "long": array(1, 4, 1),
        "short": array(1, 4, 1),
        "slope": array(1),
        "weight_g": array(4, 1, 1),
        "weight_v": array(4, 3, 1),
    }
    template = {"long": (1, 1, 4), "short": (4,), "slope": (), "kernel": (3, 4)}
    tree = from_state_dict(
        state, {name: jnp.zeros(shape) for name, shape in template.items()}, layouts=layouts
    )
    np.testing.assert_array_equal(tree["long"][0, 0], state["long"][0, :, 0])
    np.testing.assert_array_equal(tree["short"], state["short"][0, :, 0])
    np.testing.assert_array_equal(tree["kernel"].v, state["weight_v"][:, :, 0].T)
    back = to_state_dict(tree, layouts=layouts, style="weight_g")
    chex.assert_trees_all_equal(back, state)
    for axes in ((1, 0), ((0,), (0,)), ((1,),)):
        with pytest.raises(ValueError, match="Layout: axes must be tuples"):
            Layout(axes)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(NAMED)),
    data=st.data(),
)
def test_layouts_are_undone_bit_for_bit(name, data):
    """With any shape, and whichever of its axes `dim` is."""
    least, most, layout = NAMED[name]
    sizes = st.lists(st.integers(1, 4), min_size=min(most, max(least, 3)), max_size=min(most, 5))
    shape = data.draw(sizes)
    v_shape = layout(len(shape)).torch_shape(shape)
    dim = data.draw(st.sampled_from([None, *range(len(v_shape))]))
    g_shape = [size if axis == dim else 1 for axis, size in enumerate(v_shape)]
    state = {"weight_g": array(*([] if dim is None else g_shape)), "weight_v": array(*v_shape)}
    layouts = {"kernel": name}
    tree = from_state_dict(state, {"kernel": jnp.zeros(shape)}, layouts=layouts)
    back = to_state_dict(tree, layouts=layouts, style="weight_g")
    np.testing.assert_array_equal(back["weight_v"], state["weight_v"])
    np.testing.assert_array_equal(back["weight_g"].ravel(), state["weight_g"].ravel())
    if dim == 0 or (dim is None and v_shape[0] > 1):  # else its shape does not tell
        assert back["weight_g"].shape == state["weight_g"].shape
    like = to_state_dict(tree, layouts=layouts, style="weight_g", like=state)
    assert like["weight_g"].shape == state["weight_g"].shape


def test_names_that_are_written_out_stay_as_they_are():
    """Flax's words for parameters are PyTorch names too; only what the path says is translated."""
    state = {"layer_scale.scale": array(4), "norm.weight": array(3)}
    template = {"layer_scale": {"scale": jnp.zeros(4)}, "norm_0": {"scale": jnp.zeros(3)}}
    names = {"layer_scale/scale": "layer_scale.scale", r"norm_\d/(.*)": r"norm.\1"}
    tree = from_state_dict(state, template, names)
    chex.assert_trees_all_equal(to_state_dict(tree, names), state)
    with pytest.raises(ValueError, match=r"names: .* invalid group reference"):
        from_state_dict(state, template, {"layer_scale/scale": r"scale.\1"})


def test_random_state_is_left_alone():
    """And is not written."""
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
    )
    graph, template = nnx.split(model)
    state = {"layers.0.weight": array(3, 2), "layers.0.bias": array(3)}
    tree = from_state_dict(state, template)
    chex.assert_trees_all_equal(to_state_dict(tree), state)
    nnx.merge(graph, tree)(jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("g", "v"), [((), (1, 8, 3)), ((1, 1, 1), (8, 1, 3)), ((), (8, 1, 3)), ((0, 1, 1), (0, 2, 3))]
)
def test_single_gains_have_the_shape_that_they_had(g, v):
    """Where several values of dim would give them: the state dict that was read tells."""
    state = {"weight_g": array(*g), "weight_v": array(*v)}
    tree = from_state_dict(state, {"kernel": jnp.zeros(v[::-1])})
    chex.assert_trees_all_equal(to_state_dict(tree, style="weight_g", like=state), state)


def test_safetensors_files(tmp_path):
    """Written by safetensors itself, in bfloat16 too."""
    state = checkpoint()
    del state["norm.num_batches_tracked"]
    arrays = {name: jnp.asarray(x) for name, x in state.items()}
    arrays["table.weight"] = arrays["table.weight"].astype(jnp.bfloat16)
    save_file(arrays, tmp_path / "model.safetensors")
    template = variables()
    low = jax.ShapeDtypeStruct((5, 2), jnp.bfloat16)
    template["params"]["table"]["embedding"] = low
    tree = from_state_dict(tmp_path / "model.safetensors", template)
    chex.assert_trees_all_equal(tree, from_state_dict(arrays, template))
    assert tree["params"]["table"]["embedding"].dtype == jnp.bfloat16


def test_files_keep_64_bits(tmp_path):
    """JAX would round them before they are looked at."""
    save_numpy({"a.weight": np.full((1, 1), 0.1), "b": array(1)}, tmp_path / "a.safetensors")
    file, template = tmp_path / "a.safetensors", {"kernel": np.zeros((1, 1))}
    text = "weight is float64, and the template's float32 does not hold its values"
    assert text in message(file, template, prefix="a.")
    with jax.enable_x64(True):
        assert from_state_dict(file, template, prefix="a.")["kernel"] == 0.1


def test_files_of_another_kind():
    with pytest.raises(ValueError, match=r"model\.pth is no \.safetensors file; .*torch\.load"):
        from_state_dict("model.pth", variables())
    with pytest.raises(
        TypeError, match=r"'generator' in the state dict is a dict\. Of a checkpoint"
    ):
        from_state_dict({"generator": {}, "steps": 3}, variables())
    with pytest.raises(TypeError, match="bias in the state dict is a float, no array"):
        from_state_dict({"bias": 0.5}, {"bias": jnp.zeros(1)})
    with pytest.raises(TypeError, match="3 in the state dict is no name"):
        from_state_dict({3: array(1)}, {"bias": jnp.zeros(1)})
    with pytest.raises(TypeError, match=r"must be a mapping .* got a list"):
        from_state_dict([], variables())


def test_tensors_of_pytorch():
    """Of any dtype, and copied: PyTorch goes on writing to its own."""
    torch = pytest.importorskip("torch", reason="this is about its tensors")
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"a": weight, "b": torch.ones(3, dtype=torch.bfloat16) / 3}
    template = {"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16)}
    tree = from_state_dict(state, template)
    with torch.no_grad():
        weight.mul_(2)
    np.testing.assert_array_equal(tree["a"], np.ones(3))
    np.testing.assert_array_equal(tree["b"].astype(np.float32), state["b"].float().numpy())


def test_arrays_are_copied():
    state = {"bias": array(256)}
    before = state["bias"].copy()
    tree = from_state_dict(state, {"bias": jnp.zeros(256)})
    state["bias"] *= 2
    np.testing.assert_array_equal(tree["bias"], before)


def test_boxes_shardings_and_states():
    state = {"kernel_g": array(4, 1), "kernel_v": array(4, 2)}
    state = {name.replace("kernel", "weight"): x for name, x in state.items()}
    g, v = state["weight_g"].T, state["weight_v"].T
    boxed = {"kernel": nn.Partitioned(jnp.zeros((2, 4)), ("in", "out"))}
    gv = from_state_dict(state, boxed)["kernel"]
    assert (gv.g.names, gv.v.names) == ((None, "out"), ("in", "out"))
    np.testing.assert_array_equal(gv.g.value, g)
    chex.assert_trees_all_equal(to_state_dict({"kernel": gv}, style="weight_g"), state)

    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("x", "y"))
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=sharding)}
    gv = from_state_dict(state, shapes)["kernel"]
    assert gv.v.sharding == sharding
    assert gv.g.sharding == NamedSharding(mesh, P(None, "y"))
    np.testing.assert_array_equal(gv.v, v)

    states = nnx.state(nnx.Linear(2, 4, use_bias=False, rngs=nnx.Rngs(0)))
    loaded = from_state_dict(state, states)
    assert isinstance(loaded, nnx.State)
    np.testing.assert_array_equal(loaded["kernel"].get_value().g, g)
    np.testing.assert_array_equal(loaded["kernel"].get_value().v, v)


def test_a_template_with_gv_leaves_wants_them():
    template = wnjax.weight_norm({"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32)})
    state = {"weight_g": array(4, 1), "weight_v": array(4, 2)}
    plain = {"kernel": jnp.zeros((2, 4))}
    chex.assert_trees_all_equal(from_state_dict(state, template), from_state_dict(state, plain))
    text = message({"weight": array(4, 2)}, template)
    assert "kernel: weight is a plain weight without weight_g, and the template has g" in text
    text = message(state | {"weight_g": array(1, 2)}, template)
    assert "weight_g gives a WeightNorm with g of shape (2, 1), the template has a Wei" in text
    assert "with g of shape (1, 4)" in text
    log = wnjax.weight_norm({"kernel": jnp.ones((2, 4))}, log_scale=True)
    assert "LogWeightNorm with log_g of shape (1, 4)" in message(state, log)


def test_log_gains_are_written_as_gains():
    w = {"kernel": jnp.abs(array(2, 4)) + 1}
    state = to_state_dict(wnjax.weight_norm(w, log_scale=True), style="weight_g")
    lengths = np.linalg.norm(w["kernel"], axis=0)[:, None]
    np.testing.assert_allclose(state["weight_g"], lengths, rtol=1e-6)


def test_what_pytorch_cannot_have():
    """A gain for each layer of a stack and each of its neurons."""
    stack = wnjax.weight_norm({"blocks": jnp.ones((2, 3, 4))}, {"blocks": (0, 2)})
    with pytest.raises(ValueError, match=r"blocks: g of shape \(2, 1, 4\) .* along several axes"):
        to_state_dict(stack)
    plain = to_state_dict(wnjax.fold(stack))
    assert plain["blocks"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="style must be one of parametrizations, weight_g"):
        to_state_dict(stack, style="old")
