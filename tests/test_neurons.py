"""`neurons` against axes that were derived by hand."""

import re

import pytest

import wnjax
from tests import traced_layers, traced_layers_flax, traced_layers_nested, traced_models
from wnjax._leaves import flatten, unbox

LAYERS = traced_layers.CASES | traced_layers_flax.CASES | traced_layers_nested.CASES
MODELS = traced_models.MODELS


def decisions(tree):
    """From slash paths to decisions."""
    return {path: unbox(leaf) for path, leaf in flatten(tree)[0]}


def check(found, expected):
    for path, decision in decisions(found).items():
        (want,) = [want for pattern, want in expected.items() if re.fullmatch(pattern, path)]
        if isinstance(want, str):
            assert isinstance(decision, wnjax.NotNeuron), path
            assert want in decision.reason, path
        else:
            assert isinstance(decision, wnjax.Neuron), (path, decision)
            assert decision.feature_axes == want, path


def biases(found):
    neurons = {p: d for p, d in decisions(found).items() if isinstance(d, wnjax.Neuron)}
    return {path: d.bias for path, d in neurons.items() if d.bias}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    fn, params, args = LAYERS[name].build()
    found = wnjax.neurons(fn, params, *args)
    check(found, LAYERS[name].expected)
    if LAYERS[name].biases is not None:
        assert biases(found) == LAYERS[name].biases


@pytest.mark.parametrize("is_full_size", [False, True], ids=["tiny", "full_size"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, is_full_size):
    """At full size everything is abstract: nothing is computed, and no memory needed."""
    fn, params, args = MODELS[name].build(is_full_size)
    found = wnjax.neurons(fn, params, *args)
    check(found, MODELS[name].expected)
    if MODELS[name].biases is not None:
        neurons = [p for p, d in decisions(found).items() if isinstance(d, wnjax.Neuron)]
        expected = {
            path: match.expand(template)
            for path in neurons
            for pattern, template in MODELS[name].biases.items()
            if (match := re.fullmatch(pattern, path))
        }
        assert biases(found) == expected
