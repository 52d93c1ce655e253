"""What `to_state_dict` gives is PyTorch's own: every entry of PyTorch takes it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wnjax
from tests.golden import torch_modules
from tests.test_pytorch import array
from tests.test_pytorch_modules import MODELS, channels_last, comparable
from wnjax.pytorch import Layout, from_state_dict, to_state_dict

CASES = [(case, api) for case in torch_modules.CASES for api in torch_modules.APIS]


def loaded(case, api):
    """The Flax tree of a recorded module, and what wrote it back."""
    record = torch_modules.recorded(case, api)
    module, names, layouts = MODELS[case]
    template = jax.eval_shape(module.init, jax.random.key(0), channels_last(record["call"]["x"]))
    tree = from_state_dict(record["state"], template, names, layouts=layouts)
    return record["state"], tree, {"names": names, "layouts": layouts, "style": api}


def assert_own(back, tree):
    """Every array is contiguous, may be written to, and shares no memory."""
    others = [np.asarray(x) for x in jax.tree.leaves(tree)]
    for name, x in back.items():
        assert type(x) is np.ndarray, name
        assert x.flags.c_contiguous, name
        assert x.flags.writeable, name
        assert all(stride >= 0 for stride in x.strides), name  # 0 without elements
        assert not any(np.shares_memory(x, other) for other in others), name
        others.append(x)


@pytest.mark.parametrize(("case", "api"), CASES)
def test_arrays_are_contiguous_and_nobody_elses(case, api):
    _, tree, rules = loaded(case, api)
    assert_own(to_state_dict(tree, **rules), tree)
    plain = wnjax.fold(tree)
    assert_own(to_state_dict(plain, **rules), plain)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (0, 3), (3, 4), (1, 1, 3), (2, 1, 4), (1, 4, 4)])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_arrays_of_any_shape(shape, kind):
    """Of numpy too, as they come, and in every layout that takes as many axes."""
    x = array(*shape)
    views = [x, x[..., ::-1], x.T] if shape else [x]
    rank = len(shape)
    layouts = ["same", *(["linear", "heads"] if rank >= 2 else [])]
    layouts += ["conv", "conv_transpose", Layout(((1, 2), (0,), ()))] if rank >= 3 else []
    for view in views:
        for layout in layouts:
            tree = {"kernel": kind(view)}
            assert_own(to_state_dict(tree, layouts={"kernel": layout}), tree)


def test_what_pytorch_adds_does_not_come_into_jax():
    params = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "scale": np.ones(3)}
    for tree in (params, wnjax.weight_norm(params)):
        before = jax.tree.map(np.array, tree)
        for x in to_state_dict(tree).values():
            x.fill(5)
        chex.assert_trees_all_equal(tree, before)


@pytest.mark.parametrize(("case", "api"), CASES)
def test_pytorch_takes_every_array(case, api, tmp_path):
    """By each of its doors; and its module computes as before."""
    torch = pytest.importorskip("torch", reason="this is about its functions")
    from safetensors.torch import save_file as save_tensors  # noqa: PLC0415 - imports torch

    state, tree, rules = loaded(case, api)
    back = to_state_dict(tree, **rules, like=state)
    module, x = torch_modules.example(case, api)
    expected = comparable(state)
    for convert in (torch.tensor, torch.from_numpy, torch.as_tensor):
        tensors = {name: convert(x) for name, x in back.items()}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
        module.load_state_dict(tensors, strict=True)
        chex.assert_trees_all_equal(
            {name: x.numpy() for name, x in module.state_dict().items() if name in expected},
            expected,
        )
    y = torch_modules.recorded(case, api)["call"]["y"]
    np.testing.assert_allclose(module(x).detach(), y, atol=1e-5)
    file = tmp_path / "model.safetensors"
    for save, arrays in ((save_file, back), (save_tensors, tensors)):
        save(arrays, file)
        chex.assert_trees_all_equal(load_file(file), back)


def test_pytorch_takes_bfloat16_by_a_file(tmp_path):
    torch = pytest.importorskip("torch", reason="this is about its functions")
    from safetensors.torch import load_file as load_tensors  # noqa: PLC0415 - imports torch

    tree = {"kernel": jnp.asarray(array(4, 4, 3), jnp.bfloat16)}
    back = to_state_dict(tree, layouts={"kernel": "conv_transpose"})
    save_file(back, tmp_path / "model.safetensors")
    weight = load_tensors(tmp_path / "model.safetensors")["weight"]
    assert weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.float(), back["weight"].astype(np.float32))
