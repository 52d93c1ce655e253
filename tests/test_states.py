"""Trees with the state of an optimizer in them: every function of parameters refuses them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import wnjax
from tests import toys

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def params():
    return toys.mlp_params()


def nnx_optimizer(module=None):
    module = module or nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)


class OwnState(TrainState):
    """As users make them, with more fields."""

    batch_stats: dict


def own_transformation():
    """Of an optimizer whose state is a plain dict."""
    return optax.GradientTransformation(lambda params: {"m": params}, lambda g, s, p=None: (g, s))


STATES = {
    "train state": (
        lambda: TrainState.create(apply_fn=None, params=params(), tx=OPTIMIZER),
        "the tree is of the type TrainState",
    ),
    "train state of an own optimizer": (
        lambda: {
            "generator": OwnState.create(
                apply_fn=None, params=params(), tx=own_transformation(), batch_stats={}
            )
        },
        "generator is of the type OwnState",
    ),
    "state of a chain": (lambda: OPTIMIZER.init(params()), "0 is of the type EmptyState"),
    "moments": (
        lambda: {"adam": optax.scale_by_adam().init(params())},
        "adam is of the type ScaleByAdamState",
    ),
    "moments of leaves": (
        lambda: {"adam": optax.adam(1e-3).init(wnjax.weight_norm(params()))},
        "adam/0 is of the type ScaleByAdamState",
    ),
    "dict": (
        lambda: {"params": params(), "opt_state": optax.sgd(0.1, 0.9).init(params())},
        "opt_state/0 is of the type TraceState",
    ),
    "masked": (
        lambda: {
            "opt_state": optax.masked(optax.adam(0.1), {name: True for name in params()}).init(
                params()
            )
        },
        "opt_state is of the type MaskedState",
    ),
    "weight_normalized": (
        lambda: {"opt_state": wnjax.weight_normalized(optax.sgd(0.1)).init(params())},
        "opt_state is of the type WeightNormalizedState",
    ),
    "data_initialized": (
        lambda: wnjax.data_initialized(optax.sgd(0.1), toys.mlp).init(params()),
        "the tree is of the type DataInitializedState",
    ),
    "nnx optimizer": (nnx_optimizer, "opt_state/0 is of the type ScaleByAdamState"),
    "state of an nnx optimizer": (
        lambda: nnx.state(nnx_optimizer()),
        "opt_state/0/count is of the type OptArray",
    ),
    "state of model and optimizer": (
        lambda: nnx.state((module := nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx_optimizer(module))),
        "1/opt_state/0/count is of the type OptArray",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_weight_norm_refuses_states_and_says_where(name):
    make, where = STATES[name]
    with pytest.raises(
        ValueError, match=rf"^{where}, which holds the state of .*Pass the parameters"
    ):
        wnjax.weight_norm(make())


FUNCTIONS = {
    "weight_norm by patterns": lambda state: wnjax.weight_norm(state, {".*kernel": -1}),
    "fold": wnjax.fold,
    "wrap": wnjax.wrap(lambda state: 0.0),
    "infer_axes": wnjax.infer_axes(lambda state: 0.0),
    "data_init": wnjax.data_init(lambda state: 0.0),
    "weight_normalized": wnjax.weight_normalized(optax.sgd(0.1)).init,
    "keep_norms": wnjax.keep_norms().init,
    "labels": wnjax.labels,
    "norms": wnjax.norms,
    "summary": wnjax.summary,
    "to_state_dict": lambda state: wnjax.pytorch.to_state_dict(state, {}),
    "from_state_dict": lambda state: wnjax.pytorch.from_state_dict({}, state, {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_parameters_refuses_states(name):
    normalized_params = wnjax.weight_norm(params())
    state = TrainState.create(apply_fn=None, params=normalized_params, tx=optax.adam(1e-3))
    for tree, where in ((state, "the tree"), ({"opt": state.opt_state}, "opt/0")):
        with pytest.raises(
            ValueError, match=rf"^{where} is of the type \w+, which holds the state"
        ):
            FUNCTIONS[name](tree)


def test_states_may_be_among_the_other_arguments():
    """`infer_axes` and `wrap` look into the first argument alone."""
    state = TrainState.create(apply_fn=None, params=params(), tx=optax.adam(1e-3))

    def fn(params, state, x):
        return toys.mlp(params, x) * state.step

    x = jnp.ones((2, 3))
    axes = wnjax.infer_axes(fn)(state.params, state, x)
    normalized_params = wnjax.weight_norm(state.params, axes)
    assert (
        jax.eval_shape(wnjax.wrap(fn), normalized_params, state, x).shape
        == toys.mlp(params(), x).shape
    )


@pytest.mark.parametrize("tree", [optax.MaskedNode(), {"a": optax.MaskedNode()}])
def test_masked_leaves_are_no_states(tree):
    assert wnjax.fold(tree) == tree
