"""What `wrap` leaves as it is: all equations of a program, and what they carry."""

import json
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

import wnjax
from wnjax._analysis import calls
from wnjax._analysis.jaxprs import JaxprAnalyzer
from wnjax._transforms import wrap as wrapping


@pytest.fixture
def always_on_outputs(monkeypatch):
    monkeypatch.setattr(wrapping, "scales_output", lambda *_: True)


def equations(jaxpr):
    return [(eqn.primitive, str(eqn.params)) for eqn in jaxpr.eqns]


def test_a_function_with_small_weights_keeps_its_equations():
    def fn(params, x):
        x = jax.nn.relu(x @ params["a"])
        return jax.checkpoint(lambda x: jnp.tanh(x @ params["b"]))(x).sum()

    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3))}, jnp.ones((50, 3))
    tree = wnjax.weight_norm(params, {".*": -1})
    plain = jax.make_jaxpr(fn)(params, x).jaxpr
    wrapped = jax.make_jaxpr(wnjax.wrap(fn))(tree, x).jaxpr
    weights = [eqn for eqn in wrapped.eqns if eqn.params.get("name") == "weight"]
    assert len(weights) == 2
    rest = wrapped.replace(eqns=[eqn for eqn in wrapped.eqns if eqn not in weights])
    assert equations(rest) == equations(plain)


# Programs without their scalings.


def stripped(jaxpr, scales):
    """An open jaxpr without what depends on some of its inputs, the scales.

    What multiplies a value by them becomes that value.
    """
    same, tainted, eqns = {}, set(scales), []

    def read(var):
        return var if isinstance(var, core.Literal) else same.get(var, var)

    for eqn in jaxpr.eqns:
        is_scale = [not isinstance(v, core.Literal) and v in tainted for v in eqn.invars]
        operands = [read(v) for v, drop in zip(eqn.invars, is_scale, strict=True) if not drop]
        if eqn.primitive.name == "in_order":
            same[eqn.outvars[0]] = operands[0]
            tainted.add(eqn.outvars[1])
        elif any(is_scale) and eqn.primitive.name in ("mul", "convert_element_type") and operands:
            same[eqn.outvars[0]] = operands[0]
        elif any(is_scale) and operands and _jaxprs(eqn):
            eqns.append(without_operands(eqn, is_scale, operands))
        elif any(is_scale):
            tainted.update(eqn.outvars)
        else:
            is_merged = eqn.primitive.name == "contraction"
            primitive = core.primitives.dot_general_p if is_merged else eqn.primitive
            eqns.append(eqn.replace(primitive=primitive, invars=operands))
    inputs = [var for var in jaxpr.invars if var not in scales]
    return jaxpr.replace(invars=inputs, outvars=list(map(read, jaxpr.outvars)), eqns=eqns)


def _jaxprs(eqn):
    return [name for name in ("jaxpr", "call_jaxpr", "branches") if name in eqn.params]


def without_operands(eqn, is_scale, operands):
    """An equation with jaxprs inside, without the operands that are scales."""
    params, (name,) = dict(eqn.params), _jaxprs(eqn)

    def without(jaxpr):
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        drop = is_scale[len(is_scale) - len(inner.invars) :]
        scales = [var for var, gone in zip(inner.invars, drop, strict=True) if gone]
        new = stripped(inner, scales)
        return jaxpr.replace(jaxpr=new) if hasattr(jaxpr, "jaxpr") else new

    many = isinstance(params[name], tuple)
    params[name] = tuple(map(without, params[name])) if many else without(params[name])
    for key in ("in_shardings", "in_layouts", "donated_invars"):
        if key in params:
            pairs = zip(params[key], is_scale, strict=True)
            params[key] = tuple(value for value, gone in pairs if not gone)
    if eqn.primitive.name == "scan" and "num_consts" in params:
        params["num_consts"] -= sum(is_scale[: params["num_consts"]])
    if "ft_in" in params:
        params["ft_in"] = "groups"
    return eqn.replace(params=params, invars=operands)


def as_text(jaxpr):
    """A jaxpr with the names of its variables in their order; how scans group them apart."""
    eqns = [
        eqn.replace(params={**eqn.params, "ft_in": "groups"}) if "ft_in" in eqn.params else eqn
        for eqn in jaxpr.eqns
    ]
    return str(jaxpr.replace(eqns=eqns))


def mlp(params, x):
    for name in "ab":
        with jax.named_scope(name):
            x = jax.nn.gelu(x @ params[name] + params["bias"][None])
    return x


def heads(params, x):
    q = jnp.einsum("bd,dhk->bhk", x, params["q"])
    return jnp.einsum("bhk,hkd->bd", jnp.tanh(q), params["o"])


def nested(params, x):
    """A scan of rematerialized layers, a choice, a jit and constants that the scan closes over."""

    @jax.checkpoint
    def layer(x, w):
        h = jax.jit(lambda w, x: jnp.tanh(x @ w), inline=False)(w, x) @ params["b"]
        return lax.cond(x.sum() > 0, lambda w, h: h @ w, lambda w, h: h - 1, w, h), None

    return lax.scan(layer, x, params["stack"], unroll=2)[0]


PROGRAMS = {
    "mlp": (mlp, {"a": (4, 4), "b": (4, 4), "bias": (4,)}, {"a": 1, "b": 1, "bias": None}),
    "heads": (heads, {"q": (4, 2, 3), "o": (2, 3, 4)}, {"q": (1, 2), "o": 2}),
    "nested": (nested, {"stack": (3, 4, 4), "b": (4, 4)}, {"stack": (0, 2), "b": 1}),
}


@pytest.mark.usefixtures("always_on_outputs")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_its_scalings_is_the_original(name, monkeypatch):
    fn, shapes, axes = PROGRAMS[name]
    params = {key: jnp.ones(shape) for key, shape in shapes.items()}
    x, programs = jnp.ones((2, 4)), []
    rewrite = wrapping.rewrite

    def remembered(jaxpr, *args):
        programs.append((jaxpr, rewrite(jaxpr, *args)))
        return programs[-1][1]

    monkeypatch.setattr(wrapping, "rewrite", remembered)
    wnjax.wrap(fn)(wnjax.weight_norm(params, axes), x)
    ((plain, (jaxpr, takes, _)),) = programs
    assert len(takes) == sum(one is not None for one in axes.values())
    assert as_text(jaxpr) != as_text(plain)
    assert as_text(stripped(jaxpr, jaxpr.invars[-len(takes) :])) == as_text(plain)


# What equations carry.


def equation(jaxpr, name):
    """The first equation of a primitive, however deep it is."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            return eqn
        for inner in core.jaxprs_in_params(eqn.params):
            if found := equation(getattr(inner, "jaxpr", inner), name):
                return found
    return None


@pytest.mark.usefixtures("always_on_outputs")
def test_shardings_inside_survive():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "a"))

    def fn(params, x):
        return jax.jit(lambda w: jnp.tanh(x @ w), out_shardings=sharding)(params["w"])

    w = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec()))
    x = jax.device_put(jnp.ones((2, 8)), NamedSharding(mesh, PartitionSpec()))
    tree = wnjax.weight_norm({"w": w}, {"w": 1})
    for wrapped in (wnjax.wrap(fn), jax.jit(wnjax.wrap(fn))):
        y = wrapped(tree, x)
        assert y.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(y, fn({"w": w}, x), rtol=1e-6)


@pytest.mark.usefixtures("always_on_outputs")
def test_name_scopes_and_lines_survive():
    @jax.jit
    def inner(w, x):
        with jax.named_scope("layer0"):
            return x @ w

    def fn(params, x):
        with jax.named_scope("enc"):
            return inner(params["w"], x)

    tree, x = wnjax.weight_norm({"w": jnp.ones((4, 4))}, {"w": 1}), jnp.ones((2, 4))
    text = jax.jit(wnjax.wrap(fn)).lower(tree, x).as_text(debug_info=True)
    assert '"jit(fn)/enc/jit(inner)"' in text or "enc/jit(inner)" in text
    assert "layer0/dot_general" in text
    assert "layer0/mul" in text  # the scaling belongs to the layer
    assert "test_rewrite.py" in text


@pytest.mark.usefixtures("always_on_outputs")
def test_options_survive():
    def step(x, w):
        return jnp.tanh(x @ w), x

    def fn(params, x):
        inner = jax.jit(lambda w, x: x @ w, donate_argnums=(1,), keep_unused=True)
        x = inner(params["w"], x)
        return lax.scan(step, x, params["stack"], reverse=True, unroll=3, _split_transpose=True)

    params = {"w": jnp.ones((4, 4)), "stack": jnp.ones((3, 4, 4))}
    tree = wnjax.weight_norm(params, {"w": 1, "stack": (0, 2)})
    jaxpr = jax.make_jaxpr(wnjax.wrap(fn))(tree, jnp.ones((2, 4))).jaxpr
    (call,) = (eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "<lambda>")
    assert call.params["donated_invars"] == (False, True, False)  # the last one is the scale
    assert call.params["keep_unused"]
    plain = equation(jax.make_jaxpr(fn)(params, jnp.ones((2, 4))).jaxpr, "scan")
    scan = equation(jaxpr, "scan")
    assert len(scan.invars) == len(plain.invars) + 1
    for option in plain.params.keys() - {"jaxpr", "num_consts", "ft_in", "ft_out", "linear"}:
        assert scan.params[option] == plain.params[option]
    assert (scan.params["reverse"], scan.params["unroll"]) == (True, 3)


def test_parameters_that_nobody_knows_are_copied():
    """JAX traces no `jit` with compiler options inside of another: here they are put in."""
    eqn = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0).eqns[0]
    options = {"compiler_options_kvs": (("option", "value"),), "of_tomorrow": "this"}
    params = calls.extended_call(eqn.replace(params=eqn.params | options), 2, 1)
    assert {key: params[key] for key in options} == options
    assert len(params["in_shardings"]) == 3
    assert len(params["out_shardings"]) == 2


def params_by_count(make):
    """The parameters of an equation that have an entry for each operand, and for each result."""
    one, more_operands, more_results = (make(*counts) for counts in ((1, 1), (2, 1), (1, 2)))
    lengths = [
        {name: len(value) for name, value in params.items() if isinstance(value, tuple)}
        for params in (one, more_operands, more_results)
    ]
    return tuple(
        {name for name, length in changed.items() if length != lengths[0].get(name)}
        for changed in lengths[1:]
    )


def call_of(transform):
    def make(operands, results):
        def fn(*args):
            return [sum(args) + i for i in range(results)]

        return jax.make_jaxpr(transform(fn))(*[1.0] * operands).eqns[-1].params

    return make


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_all_parameters_that_count_operands_are_known(transform):
    """One that a later JAX adds would be copied, and be too short."""
    primitive = jax.make_jaxpr(transform(lambda x: x + 1))(1.0).eqns[-1].primitive
    known = calls.CALLS[primitive]
    assert params_by_count(call_of(transform)) == (set(known.of_operands), set(known.of_results))


def test_all_parameters_of_scans_that_count_operands_are_known():
    def make(operands, results):
        def step(_, xs):
            return None, [sum(xs)] * results

        xs = [jnp.ones(3)] * operands
        return jax.make_jaxpr(lambda xs: lax.scan(step, None, xs))(xs).eqns[-1].params

    assert params_by_count(make) == (set(), set())


# What it costs.


@pytest.mark.parametrize("carried", [False, True], ids=["closed_over", "carried"])
def test_the_analysis_of_nested_scans_is_linear_in_their_depth(carried, monkeypatch):
    calls = []
    equation_of = JaxprAnalyzer.equation

    def counted(self, eqn, ins):
        calls.append(eqn)
        return equation_of(self, eqn, ins)

    monkeypatch.setattr(JaxprAnalyzer, "equation", counted)

    def cost(depth):
        def body(level, w, x):
            if level == depth:
                return jnp.tanh(x @ w)
            if carried:
                (w, x), _ = lax.scan(
                    lambda c, _: ((c[0], body(level + 1, *c)), None), (w, x), None, length=2
                )
                return x
            return lax.scan(lambda x, _: (body(level + 1, w, x), None), x, None, length=2)[0]

        calls.clear()
        params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
        axes = wnjax.infer_axes(lambda p, x: body(0, p["w"], x))(params, x)
        assert axes["w"].feature_axes == (1,)
        return len(calls)

    costs = [cost(depth) for depth in range(1, 8)]
    assert len(set(np.diff(costs))) == 1


def test_tracing_once_for_all_calls_of_a_shape():
    traces = []

    @wnjax.wrap
    def fn(params, x, scale=1):
        traces.append(x.shape)
        return scale * (x @ params["w"])

    tree = wnjax.weight_norm({"w": jnp.eye(4)}, {"w": 1})
    for size in (1, 2, 1, 2):
        y = fn(jax.tree.map(lambda x: 2 * x, tree), size * jnp.ones((size, 4)))
        np.testing.assert_allclose(y, 2 * size, rtol=1e-6)
    assert traces == [(1, 4), (2, 4)]
    np.testing.assert_allclose(fn(tree, jnp.ones((1, 4)), scale=3), 3, rtol=1e-6)
    np.testing.assert_allclose(fn(tree, jnp.ones((1, 4)), scale=1.0), 1, rtol=1e-6)
    assert len(traces) == 4  # 1.0 is not 1
    jax.jit(fn)(tree, jnp.ones((1, 4)))
    assert len(traces) == 4


ONE_DEVICE = """
import sys, json, jax, jax.numpy as jnp
sys.path.insert(0, {root!r})
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", {devices})
from tests.test_rewrite import bytes_of_a_step
print(json.dumps([jax.device_count(), bytes_of_a_step()]))
"""


def bytes_of_a_step():
    """XLA's bytes of a gradient of attention with normalized weights, on one device."""
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jax.ShapeDtypeStruct((2, 8, 64), jnp.float32)

    def loss(params, x):
        return model.apply({"params": params}, x).sum()

    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    axes = wnjax.infer_axes(loss)(params, x)
    tree = jax.eval_shape(lambda p: wnjax.weight_norm(p, axes), params)
    grads = jax.jit(jax.grad(wnjax.wrap(loss), (0, 1)), donate_argnums=0)
    return grads.lower(tree, x).compile().cost_analysis()["bytes accessed"]


def test_a_call_on_one_device_costs_the_same_wherever_more_are_visible():
    root = str(__import__("pathlib").Path(__file__).parent.parent)

    def run(devices):
        code = textwrap.dedent(ONE_DEVICE).format(root=root, devices=devices)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    (one, alone), (eight, among_others) = run(1), run(8)
    assert (one, eight) == (1, 8)
    assert alone == among_others
