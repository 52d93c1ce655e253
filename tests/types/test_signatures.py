"""What type checkers see of the signatures; `make types` has both of them read it.

Where a program is wrong, a checker that stops to say so finds its `ignore` to be of no use.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import wnjax

Params = dict[str, jax.Array]


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def fn(params: Params, x: jax.Array, *, train: bool = False) -> jax.Array:
    return x @ params["kernel"]


PARAMS: Params = {"kernel": jnp.ones((3, 2))}
LAYER = Layer(jnp.ones((3, 2)), jnp.zeros(2))
X = jnp.arange(300.0).reshape(100, 3)


def test_trees_keep_their_types():
    assert_type(wnjax.fold(PARAMS), Params)
    assert_type(wnjax.fold(LAYER), Layer)
    assert_type(wnjax.fold(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))), nnx.State[Any, Any])
    assert_type(wnjax.weight_norm(LAYER), Layer)
    state: Any = wnjax.weight_normalized(optax.sgd(0.1)).init(LAYER)
    assert_type(wnjax.inner_params(state, LAYER), Layer)
    # The keys of a dict are what they were, but what it holds is not: nodes are among it.
    assert_type(wnjax.weight_norm(PARAMS), dict[str, Any])


@pytest.mark.filterwarnings("ignore:wrap. no leaf of the parameters")
def test_wrapped_functions_keep_their_parameters():
    wrapped = wnjax.wrap(fn)
    assert_type(wrapped(PARAMS, X), jax.Array)
    assert_type(wrapped(params=PARAMS, x=X, train=True), jax.Array)


def test_data_init_gives_what_it_takes():
    assert_type(wnjax.data_init(fn)(PARAMS, X, train=True), Params)
    params, report = assert_type(wnjax.data_init(fn, report=True)(PARAMS, X), tuple[Params, Any])
    assert params.keys() == report.keys()


def test_a_leaf_is_known_behind_its_guard():
    for leaf in (object(), wnjax.WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)))):
        if wnjax.is_weight_norm(leaf):
            assert_type(leaf, wnjax.WeightNorm | wnjax.LogWeightNorm)
            assert leaf.v.shape == (3, 2)


if TYPE_CHECKING:

    def wrong_programs():
        # Each line is wrong. A checker that no longer says so reports an ignore that is not needed.
        wnjax.wrap(fn)(PARAMS, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        wnjax.wrap(fn)(PARAMS)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        wnjax.wrap(fn)(PARAMS, X, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        wnjax.data_init(fn)(PARAMS, x=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        wnjax.data_init(fn, report=True)(PARAMS, X)["kernel"]  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
        wnjax.data_init(fn, sdt=0.5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
        wnjax.data_initialized(optax.sgd(0.1), fn, sdt=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        wnjax.infer_axes(fn, overrides={"kernel": "last"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
        wnjax.fold(LAYER).weight.sum()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        wnjax.pytorch.from_state_dict({}, PARAMS, layouts={"kernel": 3})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
