"""Networks spread over eight devices in every way: their losses are those of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.checkpoints import Checkpoints
from experiments.config import Mesh
from experiments.datasets.digits import digits
from experiments.placement import layout, make_mesh
from experiments.programs import Programs
from experiments.tasks.language import CharLm
from tests.experiments.losses import CONFIGS, DATA, FORMS, STEPS, losses, text

MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "tensor": Mesh(tensor=2),
    "mixed": Mesh(data=2, fsdp=2, tensor=2),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def alone(name, form):
    return losses(name, Mesh(), form)[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_one_device(form, name, mesh):
    """For 50 steps, with initialization from data and statistics of the whole batch."""
    expected, (found, states) = alone(name, form), losses(name, MESHES[mesh], form)
    assert expected[-1] < 0.95 * expected[0]  # it learns
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for x in jax.tree.leaves(states):
        assert len(x.devices()) == MESHES[mesh].size


@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_train_alike(name):
    """From v = w on; initialized from data, nodes keep v, while the optimizer's begins as w."""
    nodes, optimizer = (losses(name, Mesh(), form, init_examples=0)[0] for form in FORMS)
    np.testing.assert_allclose(optimizer, nodes, rtol=1e-4)


def test_weights_are_split_and_not_only_the_batch():
    """A device has its part of v, of g, and of the optimizer's moments."""
    _, states = losses("transformer", MESHES["mixed"], "nodes")
    kernel = "Dense_0", "kernel"  # (16, 32): 32 neurons over fsdp and tensor
    nodes = [t[kernel[0]][kernel[1]] for t in (states.params, *moments(states.optimizer))]
    for node in nodes:
        assert {x.data.shape for x in node.v.addressable_shards} == {(1, 16, 8)}
        assert {x.data.shape for x in node.g.addressable_shards} == {(1, 1, 8)}


def moments(state):
    adam = next(part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
    return adam.mu, adam.nu


def is_adam(x):
    return hasattr(x, "mu")


BOTH = ("fsdp", "tensor")
SPECS = {  # of v; g is whole where its size is 1
    "cnn": {
        "Conv_0/kernel": ((), (), (), BOTH),
        "Conv_1/kernel": ((), (), (), BOTH),
        "Dense_0/kernel": ((), ("fsdp",)),  # of ten neurons
        "Dense_0/bias": ((),),
    },
    "transformer": {
        **{
            f"MultiHeadDotProductAttention_0/{name}/kernel": ((), ("tensor",), ("fsdp",))
            for name in ("query", "key", "value")
        },
        "MultiHeadDotProductAttention_0/out/kernel": (("tensor",), (), ("fsdp",)),
        "MultiHeadDotProductAttention_0/key/bias": (("tensor",), ("fsdp",)),
        "Dense_0/kernel": ((), BOTH),
        "Dense_1/kernel": (("tensor",), ("fsdp",)),
        "Dense_2/kernel": ((), BOTH),
        "Embed_0/embedding": ((), BOTH),
        "positions": ((), BOTH),
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_where_weights_are_split(name):
    """In the parameters, and likewise in the optimizer's moments."""
    config = dataclasses.replace(CONFIGS[name], mesh=MESHES["mixed"])
    programs = Programs(config, DATA[name]())
    with jax.set_mesh(programs.mesh):
        states = jax.eval_shape(programs._init, programs.seeds, programs.train)
    places = layout(programs.mesh, states, config.task.layouts)
    for part in (places.params, *moments(places.optimizer)):
        found = jax.tree_util.tree_leaves_with_path(part)
        specs = {jax.tree_util.keystr(p, simple=True, separator="/"): x.spec for p, x in found}
        for path, (*fan_in, features) in SPECS[name].items():
            is_weight = path.endswith("kernel")
            assert specs[path + "/v" * is_weight] == jax.P("seeds", *fan_in, features), path
            if is_weight and "MultiHead" not in path:
                assert specs[f"{path}/g"] == jax.P("seeds", *[()] * len(fan_in), features)


def compiled(**changes):
    """A step of a transformer whose weights, not activations, fill the memory."""
    task = CharLm(layers=1, width=128, heads=4, hidden=512, length=16)
    changes = {"task": task, "mesh": Mesh(fsdp=8), "init_examples": 0, **changes}
    changes |= {"steps_per_eval": 1, "steps_per_call": 1}
    programs = Programs(dataclasses.replace(CONFIGS["transformer"], **changes), text())
    with jax.set_mesh(programs.mesh):
        states = jax.eval_shape(programs._init, programs.seeds, programs.train)
        places = layout(programs.mesh, states, task.layouts)
        states = jax.tree.map(with_sharding, states, places)
        return programs._steps.lower(states, programs.train).compile()


def test_weights_that_are_split_cost_next_to_nothing_more():
    """In a device's memory 5 percent at most, and no collective at all: XLA's own counts."""
    plain, *others = (
        compiled(**changes) for changes in ({"weight_norm": False}, {}, {"in_optimizer": True})
    )
    for other in others:
        assert memory(other) <= 1.05 * memory(plain)
        assert collectives(other) == collectives(plain)
    assert memory(plain) < 0.4 * memory(compiled(weight_norm=False, mesh=Mesh()))


def memory(program):
    """The bytes of one device."""
    found = program.memory_analysis()
    inputs_and_outputs = found.argument_size_in_bytes + found.output_size_in_bytes
    return inputs_and_outputs + found.temp_size_in_bytes - found.alias_size_in_bytes


def collectives(program):
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    return {name: program.as_text().count(f"{name}(") for name in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_on_eight_devices_and_restored_on_others(name, tmp_path):
    _, saved = losses(name, MESHES["mixed"], "nodes", init_examples=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, saved)
    for mesh in (Mesh(), Mesh(fsdp=4), Mesh(data=2, tensor=2)):
        changes = {"mesh": mesh, "init_examples": 0}
        programs = Programs(dataclasses.replace(CONFIGS[name], **changes), DATA[name]())
        with jax.set_mesh(programs.mesh), Checkpoints(tmp_path) as checkpoints:
            like = jax.eval_shape(programs._init, programs.seeds, programs.train)
            places = layout(programs.mesh, like, programs.config.task.layouts)
            restored = checkpoints.restore(jax.tree.map(with_sharding, like, places))
        jax.tree.map(np.testing.assert_array_equal, restored, saved)
        for x, place in zip(jax.tree.leaves(restored), jax.tree.leaves(places), strict=True):
            assert x.sharding == place


def with_sharding(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def test_batches_are_split():
    """By a gather of each device's own rows: none has the activations of all examples."""
    programs = Programs(dataclasses.replace(CONFIGS["cnn"], mesh=Mesh(data=8)), digits())
    with jax.set_mesh(programs.mesh):
        states = programs.init()
        text = programs._steps.lower(states, programs.train).compile().as_text()
    assert "f32[2,8,8,8]" in text  # 16 examples over 8 devices, after the first convolution
    assert "f32[16,8,8,8]" not in text


def test_a_rule_that_does_not_fit_says_where():
    mesh = make_mesh(CONFIGS["cnn"])
    tree = {"layer": {"kernel": jax.ShapeDtypeStruct((1, 3, 4), np.float32)}}
    with pytest.raises(ValueError, match=r"layer/kernel: the rule .* more axes than its shape"):
        layout(mesh, tree, {"kernel": (None, None, "tensor")})
