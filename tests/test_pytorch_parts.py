"""Gates of an LSTM, and what cannot be taken apart."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnjax
from tests.test_pytorch import array, message
from wnjax.pytorch import Part, from_state_dict, lstm, to_state_dict


@pytest.mark.parametrize("fused", [False, True])
def test_nnx_cells(fused):
    """Against the equations of an LSTM in numpy."""
    make = nnx.OptimizedLSTMCell if fused else nnx.LSTMCell
    cell = make(3, 4, rngs=nnx.Rngs(0))
    state = {
        "rnn.weight_ih_l1": array(16, 3),
        "rnn.weight_hh_l1": array(16, 4, seed=1),
        "rnn.bias_ih_l1": array(16, seed=2),
        "rnn.bias_hh_l1": array(16, seed=3),
    }
    graph, template = nnx.split({"cell": cell})
    names = lstm("cell", "rnn", layer=1, fused=fused)
    params = from_state_dict(state, template, names)
    x, h, c = array(2, 3, seed=4), array(2, 4, seed=5), array(2, 4, seed=6)
    (new_c, new_h), _ = nnx.merge(graph, params)["cell"]((c, h), x)
    gates = x @ state["rnn.weight_ih_l1"].T + state["rnn.bias_ih_l1"]
    gates += h @ state["rnn.weight_hh_l1"].T + state["rnn.bias_hh_l1"]
    i, f, g, o = np.split(gates, 4, axis=1)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    wanted_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(new_c, wanted_c, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new_h, sigmoid(o) * np.tanh(wanted_c), rtol=1e-5, atol=1e-5)
    back = to_state_dict(params, names)
    assert back.keys() == state.keys()
    chex.assert_trees_all_equal(from_state_dict(back, template, names), params)


def test_a_bare_lstm():
    assert lstm("cell", "")["cell/ii/kernel"] == Part("weight_ih_l0", 0, 4)


def test_the_reverse_direction():
    assert lstm("cell", "rnn", reverse=True)["cell/ii/kernel"] == Part(
        "rnn.weight_ih_l0_reverse", 0, 4
    )


def test_gains_that_parts_share():
    template = {"a": {"kernel": jnp.zeros((3, 2))}, "b": {"kernel": jnp.zeros((3, 2))}}
    names = {"a/kernel": Part("weight", 0, 2), "b/kernel": Part("weight", 1, 2)}
    state = {"weight_g": array(1, 3), "weight_v": array(4, 3)}
    assert (
        "a/kernel: weight_g of shape (1, 3) is shared by the 2 parts of weight_v of shape "
        "(4, 3), and each needs its own: only dim=0 can be split"
    ) in message(state, template, names)
    text = message({"weight": array(5, 3)}, template, names)
    assert "weight of shape (5, 3) does not split into 2 parts" in text
    names = {"[ab]/kernel": Part(("weight", "more"))}
    text = message(state | {"more": array(4, 3)}, template, names)
    assert "weight and more must be plain and of one shape to be added" in text


def test_parts_that_are_lacking_or_there_twice():
    template = {"a": {"kernel": jnp.zeros((3, 2))}, "b": {"kernel": jnp.zeros((3, 2))}}
    with pytest.raises(ValueError, match=r"weight: no leaf gives part \[1\] of 2, as a/kernel"):
        to_state_dict(template, {"a/kernel": Part("weight", 0, 2), "b/kernel": None})
    with pytest.raises(ValueError, match="a/kernel and b/kernel are both weight; give one of"):
        to_state_dict(template, {"[ab]/kernel": "weight"})


def test_parts_that_do_not_go_together():
    template = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((3, 2))}}
    names = {"a/kernel": Part("weight", 0, 2), "b/kernel": Part("weight", 1, 2)}
    for axes in (0, ()):
        normalized_params = wnjax.weight_norm(template, {".*": axes})
        with pytest.raises(ValueError, match=r"shared by the 2 parts of weight, and each has"):
            to_state_dict(normalized_params, names)
    half = wnjax.weight_norm(template, {"a/kernel": -1})
    with pytest.raises(ValueError, match="a/kernel and b/kernel are parts of weight, and must"):
        to_state_dict(half, names)
    with pytest.raises(ValueError, match="must be of one count"):
        to_state_dict(template, names | {"b/kernel": Part("weight", 1, 3)})
    whole = wnjax.weight_norm(template)
    back = to_state_dict(whole, names)["parametrizations.weight.original1"]
    assert back.shape == (4, 3)
