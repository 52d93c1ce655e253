"""Random programs: hypothesis draws the source of a function of parameters and an input.

A program is a few layers on a small activation h. A layer sums over axes of a weight, which it
reaches through a chain of random views. Layers may stand in nested functions: under `jit`,
`checkpoint`, custom rules, `cond`, `vmap`, `scan` and `shard_map`. A weight enters a nested
function as a constant, as an argument, in a carry, or as slices along any axis of a stack.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

DEVICES = (4, 2)  # the shape of the mesh of programs with `shard_map`
# Only on request: XLA on a CPU ends the process where devices wait long for one another, which
# happened on a busy machine. `tests/test_shard_map.py` has programs for every run.
ARE_DEVICES_USED = "WNJAX_PROGRAMS" in os.environ
SHARDED_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """A function `program(p, x)`; its source is its representation.

    Attributes:
      source: the source of the function.
      shapes: the shapes of the parameters.
      input_shape: the shape of x.
      seed: of the numbers of the parameters and of x.
    """

    source: str
    shapes: dict[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    seed: int

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        """What hypothesis prints."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        """The program, ready to be run."""
        shapes = f"shapes = {self.shapes}\ninput_shape = {self.input_shape}\nseed = {self.seed}"
        return f"\n{shapes}\n\n{self.source}"

    @functools.cached_property
    def fn(self) -> Callable[..., Any]:
        names = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "P": jax.P}
        names |= {"checkpoint_name": checkpoint_name}
        if "MESH" in self.source:
            auto = (jax.sharding.AxisType.Auto,) * 2
            names["MESH"] = jax.make_mesh(DEVICES, ("data", "tensor"), axis_types=auto)
        exec(compile(self.source, "<random program>", "exec"), names)
        return names["program"]

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return {name: rng.normal(size=shape) / 1.5 for name, shape in self.shapes.items()}

    @functools.cached_property
    def x(self) -> np.ndarray:
        return np.random.default_rng(self.seed + 1).normal(size=self.input_shape)


class Writer:
    """What is known of a program while it is written.

    Attributes:
      draw: of hypothesis.
      shapes: the parameters so far.
      budget: how many more layers and nested functions there may be.
      is_linear: whether only what keeps outputs linear in one single weight may be written.
      is_sharded: whether the program may use the devices.
      is_complex: whether products of complex numbers may be written.
      has_stops: whether `stop_gradient` may be written, rather than custom rules.
    """

    def __init__(self, draw: Any, budget: int, is_linear: bool = False):
        self.draw = draw
        self.budget = budget
        self.is_linear = is_linear
        self.is_sharded = self.chance(4) and ARE_DEVICES_USED
        self.is_complex = self.chance(3)
        self.has_stops = self.chance(3)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.count = 0

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, out_of: int) -> bool:
        """True once in so many times; shrinks to False."""
        return self.draw(st.integers(0, out_of - 1)) == out_of - 1

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def parameter(self, shape: tuple[int, ...]) -> str:
        """A new parameter, or now and then one that is in use already."""
        old = [name for name, other in self.shapes.items() if other == shape]
        if old and self.chance(3):
            return f'p["{self.one_of(*old)}"]'
        name = f"w{len(self.shapes)}"
        self.shapes[name] = shape
        return f'p["{name}"]'


@dataclasses.dataclass
class Scope:
    """A function of the program, and how weights come into it from the function around it.

    Attributes:
      writer: of the program.
      around: the function around it; None for the program.
      number: one of its own, for the names of its arguments.
      lines: its body.
      args: arguments that are weights, and what is passed for them.
      slices: arguments that are slices of stacks, and (the stack, its axis).
      carries: weights in the carry of a loop, and what they are before it.
      length: of stacks.
      closes: whether it may use what the function around it sees.
      takes_args: whether weights may be arguments.
      takes_carries: whether weights may be carried.
      is_local: whether it is somewhere in a `shard_map`.
      has_batch: whether its batch is that of the program.
      in_rule: whether it is somewhere in a function with a custom rule, which calls `jvp` or `vjp`.
    """

    writer: Writer
    around: Scope | None = None
    number: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)
    args: dict[str, str] = dataclasses.field(default_factory=dict)
    slices: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    carries: dict[str, str] = dataclasses.field(default_factory=dict)
    length: int = 0
    closes: bool = True
    takes_args: bool = True
    takes_carries: bool = False
    is_local: bool = False
    has_batch: bool = True
    in_rule: bool = False

    def leaf(self, shape: tuple[int, ...]) -> str:
        """An expression for a weight of a shape."""
        if self.around is None:
            return self.writer.parameter(shape)
        ways = []
        if self.length:
            ways += ["slice", "slice"]
        if self.closes:
            ways += ["closed over"]
        if self.takes_args:
            ways += ["argument"]
        if self.takes_carries and not self.writer.is_linear:
            ways += ["carry"]
        way = self.writer.one_of(*ways)
        key = self.writer.name("k")
        if way == "closed over":
            return self.around.leaf(shape)
        if way == "argument":
            self.args[key] = self.around.weight(shape)
            return f'args{self.number}["{key}"]'
        if way == "carry":
            self.carries[key] = self.around.weight(shape)
            return f'carried{self.number}["{key}"]'
        axis = self.writer.draw(st.integers(0, len(shape)))
        stack = self.around.weight((*shape[:axis], self.length, *shape[axis:]))
        self.slices[key] = (stack, axis)
        return f'slices{self.number}["{key}"]'

    def weight(self, shape: tuple[int, ...]) -> str:
        """An expression for a weight of a shape, through views."""
        many = self.writer.one_of(0, 1, 1, 2, 2, 3) if self.around is None else 1
        expression = "{}"
        for _ in range(many):
            wrapping, shape = self.view(shape)
            expression = expression.replace("{}", wrapping)
            if math.prod(shape) > 100:
                break
        while "{}" in expression:
            expression = expression.replace("{}", self.leaf(shape), 1)
        return expression

    def view(self, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """A view of which {} is the operand, and the operand's shape."""
        draw, one_of = self.writer.draw, self.writer.one_of
        axis = draw(st.integers(0, len(shape) - 1))
        before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
        axes = ", ".join(":" * len(before))
        place = f"{axes}, " if axes else ""
        order = one_of(*itertools.permutations(range(len(shape))))
        views = [
            (f"{{}}.transpose({order})", tuple(shape[order.index(i)] for i in range(len(shape)))),
            ("{}[:]", shape),
            (f"lax.rev({{}}, ({axis},))", shape),
            (f"{{}}[{place}1:]", (*before, size + 1, *after)),
            (f"lax.slice_in_dim({{}}, 0, {size}, axis={axis})", (*before, size + 2, *after)),
            (f"{{}}[{place}{one_of(0, 1)}]", (*before, 2, *shape[axis:])),
            (f"jnp.unstack({{}}, axis={axis})[{one_of(0, 1)}]", (*before, 2, *shape[axis:])),
            (f"{{}}.squeeze({axis})", (*before, 1, *shape[axis:])),
            (f"jnp.roll({{}}, 1, axis={axis})", shape),
            (f"jnp.take({{}}, np.arange({size})[::-1], axis={axis})", shape),
            ("lax.optimization_barrier({})", shape),
            ('checkpoint_name({}, "weight")', shape),
            ("lax.reduce_precision({}, 11, 52)", shape),
            ("jax.jit(lambda w: w)({})", shape),
            (f"jax.jit(lambda w: jnp.moveaxis(w, -1, {axis}))({{}})", (*before, *after, size)),
            ("jax.checkpoint(jnp.negative)({})", shape),
            ("({} / 1.5)", shape),
            ("{}.astype(jnp.complex128).real", shape),
        ]
        if size % 2 == 0:
            split = (*before, 2, size // 2, *after)
            views += [(f"{{}}.reshape({shape})", split), (f"lax.reshape({{}}, {shape})", split)]
        if after:
            views += [(f"{{}}.reshape({shape})", (*before, size * after[0], *after[1:]))]
        if size == 1:
            views += [(f"jnp.expand_dims({{}}, {axis})", (*before, *after))] * 2
        if not self.writer.is_linear:
            views += self.rarer_views(shape, axis)
        else:
            views = [view for view in views if size > 1 or math.prod(view[1]) == math.prod(shape)]
        return one_of(*(view for view in views if view[1]))

    def rarer_views(self, shape: tuple[int, ...], axis: int) -> list[tuple[str, tuple[int, ...]]]:
        """Those that combine weights, and those that are no rearrangements."""
        before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
        mask = f"(np.arange({size}) > 0).astype(float).reshape({(size, *(1 for _ in after))})"
        views = [
            (f"jnp.broadcast_to({{}}, {shape})", (*before, 1, *after)),
            ("jnp.tanh({})", shape),
            (f"({{}} * np.broadcast_to({mask}, {shape}))", shape),
            ("({} + {})", shape),
            (f"jnp.cumsum({{}}, {axis})", shape),
            (f"lax.fori_loop(0, 2, lambda i, w: jnp.roll(w, 1, axis={axis}), {{}})", shape),
        ]
        if self.writer.has_stops:
            views += 2 * [("lax.stop_gradient({})", shape)]
        if not self.is_local:
            views += [("lax.cond(h.sum() > 0, lambda w: w, lambda w: -w, {})", shape)]
        if size % 2 == 0:
            half = (*before, size // 2, *after)
            views += [(f"jnp.concatenate([{{}}, {{}}], axis={axis})", half)] * 3
            views += [
                (f"jnp.tile({{}}, {tuple(2 if i == axis else 1 for i in range(len(shape)))})", half)
            ]
        if size == 2:
            views += [(f"jnp.stack([{{}}, {{}}], axis={axis})", (*before, *after))] * 2
        if size > 2:
            pads = tuple((0, 1) if i == axis else (0, 0) for i in range(len(shape)))
            views += [(f"jnp.pad({{}}, {pads})", (*before, size - 1, *after))]
        return views

    def write(self, *lines: str) -> None:
        self.lines.extend(lines)

    def inner(self, **settings: Any) -> Scope:
        self.writer.count += 1
        for name in ("is_local", "has_batch", "in_rule"):
            settings.setdefault(name, getattr(self, name))
        return Scope(self.writer, self, self.writer.count, **settings)


def packed(weights: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in weights.items()) + "}"


def stacks(scope: Scope) -> str:
    """The stacks of the slices, with their axes in front."""
    moved = {
        key: stack if axis == 0 else f"jnp.moveaxis({stack}, {axis}, 0)"
        for key, (stack, axis) in scope.slices.items()
    }
    return packed(moved)


def contraction(scope: Scope, n: int) -> tuple[str, int]:
    """An expression that sums over weights and h, which has n columns, and its columns."""
    writer = scope.writer
    m = writer.one_of(2, 3, 4)
    order = writer.one_of(*itertools.permutations(range(4)))
    many = tuple(n if axis == order[0] else 2 for axis in range(4))
    forms: list[tuple[str, list[tuple[int, ...]], int]] = [
        ("h @ {}", [(n, m)], m),
        ("({} @ h.T).T", [(m, n)], m),
        ('jnp.einsum("bi,oi->bo", h, {})', [(m, n)], m),
        ('jnp.einsum("io,bi->bo", {}, h)', [(n, m)], m),
        ("lax.dot_general(h, {}, (((1,), (1,)), ((), ())))", [(m, n)], m),
        ("jnp.tensordot(h, {}, 1).reshape(-1, 4)", [(n, 2, 2)], 4),
        ('jnp.einsum("bi,oip->bop", h, {}).reshape(-1, 4)', [(2, n, 2)], 4),
        ('jnp.einsum("bi,bj,ijo->bo", h, jnp.sin(h), {})', [(n, n, m)], m),
        ("jnp.matmul(h[None], {}[None])[0]", [(n, m)], m),
        ("lax.map(lambda w: h @ w, {}).transpose(1, 2, 0).reshape(-1, 4)", [(2, n, 2)], 4),
        ("jax.vmap(jnp.dot, (None, 2), 1)(h, {}).reshape(-1, 4)", [(n, 2, 2)], 4),
        (_conv("NWC", "OIW", "SAME"), [(1, 1, 2)], n),
        (_conv("NWC", "WIO", "VALID"), [(n, 1, m)], m),
        (
            "lax.conv_transpose(h[:, :, None], {}, (1,), 'SAME',"
            f" dimension_numbers=('NWC', 'WIO', 'NWC'), transpose_kernel={writer.one_of(0, 1)})"
            ".reshape(len(h), -1)",
            [(2, 1, 1)],
            n,
        ),
    ]
    forms += 3 * [
        (f"jnp.tensordot(h, {{}}.transpose({order}), 1).reshape(-1, 8)[:, ::2]", [many], 4)
    ]
    # Where XLA shards the batch of a grouped convolution, the gradient of its kernel is a multiple
    # of the right one: the batch over 4 of 4 x 2 devices gives it twice (jax 0.10.2).
    if not writer.is_sharded:
        forms += [
            (
                "lax.conv_general_dilated(jnp.stack([h, jnp.sin(h)], 1), {}, (1,), 'VALID',"
                f" dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count={n})[:, 0]",
                [(2, 1, n)],
                n,
            ),
        ]
    if n == 4:
        forms += [
            ('jnp.einsum("bij,ijo->bo", h.reshape(-1, 2, 2), {})', [(2, 2, m)], m),
            ('jnp.einsum("bij,ioj->bo", h.reshape(-1, 2, 2), {})', [(2, m, 2)], m),
            (
                'jnp.einsum("bij,ijop->bop", h.reshape(-1, 2, 2), {}).reshape(-1, 4)',
                [(2, 2, 2, 2)],
                4,
            ),
            (
                'jnp.einsum("bhi,hio->bho", h.reshape(-1, 2, 2), {}).reshape(-1, 4)',
                [(2, 2, 2)],
                4,
            ),
            (
                "lax.conv_general_dilated(h.reshape(-1, 2, 2), {}, (1,), ((1, 1),),"
                " lhs_dilation=(2,), dimension_numbers=('NWC', 'WIO', 'NWC'))"
                ".reshape(len(h), -1)[:, :4]",
                [(3, 2, 2)],
                4,
            ),
        ]
    if not writer.is_linear:
        forms += rarer_contractions(scope, n, m)
    form, shapes, columns = writer.one_of(*forms)
    for shape in shapes:
        form = form.replace("{}", scope.weight(shape), 1)
    return form, columns


def _conv(inputs: str, kernel: str, padding: str) -> str:
    return (
        f"lax.conv_general_dilated(h[:, :, None], {{}}, (1,), '{padding}',"
        f" dimension_numbers=('{inputs}', '{kernel}', '{inputs}')).reshape(len(h), -1)"
    )


def rarer_contractions(
    scope: Scope, n: int, m: int
) -> list[tuple[str, list[tuple[int, ...]], int]]:
    """With several weights, with tables, and with what is not understood."""
    one_hot = f"jax.nn.one_hot(jnp.argmax(h, 1), {n}, dtype=h.dtype)"
    forms: list[tuple[str, list[tuple[int, ...]], int]] = [
        ("(h @ {}) * jax.nn.sigmoid(h @ {})", [(n, m), (n, m)], m),
        ("jax.nn.softmax((h @ {}) @ (h @ {}).T) @ (h @ {})", [(n, 2), (n, 2), (n, m)], m),
        ("h @ ({} @ {})", [(n, 2), (2, m)], m),
        (
            "(lambda a, b: jax.nn.sigmoid(a) * b)"
            "(*jnp.split(h @ jnp.concatenate([{}, {}], axis=1), 2, axis=1))",
            [(n, m), (n, m)],
            m,
        ),
        ("jnp.concatenate([h, jnp.sin(h)], 1) @ jnp.concatenate([{}, {}])", [(n, m), (n, m)], m),
        ("(h[:, :, None] * {}[None]).sum(1)", [(n, m)], m),
        ("(lambda w: w[jnp.argmax(h @ w.T, 1)] + h @ w)({})", [(n, n)], n),
        ("(lambda w: w[jnp.argmax(h, 1)] @ w.T)({})", [(n, m)], n),
        ("{}[jnp.argmax(h, 1)]", [(n, m)], m),
        (one_hot + " @ {}", [(n, m)], m),
        (f"(lambda w: jnp.tanh(h @ w[:, :{m}]) * (h @ w[:, {m}:]))({{}})", [(n, 2 * m)], m),
        ("(lambda w: jnp.tanh(h @ w[0]) @ w[1])({})", [(2, n, n)], n),
        ("(lambda w: jnp.tanh(h @ w) @ w)({})", [(n, n)], n),
        ("lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ {}[i]), h)", [(2, n, n)], n),
        ("lax.scan(lambda h, i: (jnp.tanh(h @ {}[i]), None), h, np.arange(2))[0]", [(2, n, n)], n),
    ]
    if scope.writer.is_complex:
        forms += 2 * [
            ("(h.astype(complex) @ {}.astype(complex)).real", [(n, m)], m),
            ("jnp.abs(jnp.fft.fft(h) @ {}.astype(complex) + 0.1)", [(n, m)], m),
        ]
    if scope.has_batch and not scope.is_local:
        sizes = "jnp.array([1, len(h) - 1], jnp.int32)"
        forms += [(f"lax.ragged_dot(h, {{}}, {sizes})", [(2, n, m)], m)]
    return forms


def layer(scope: Scope, n: int) -> int:
    """Writes a layer that changes h, and returns its columns."""
    writer = scope.writer
    expression, m = contraction(scope, n)
    after = [
        "jnp.tanh({})",
        "jnp.sin({})",
        "{}",
        "jnp.tanh({} + B[None])",
        "jnp.tanh({} * B[None])",
    ]
    after += ["jnp.tanh(B[None] - {} / 2)", "jnp.where(h.sum() > 0, {}, jnp.sin({}))"]
    after += ["(lambda y: y / (1 + jnp.sum(y * y, 1, keepdims=True)))({})"]
    if m == n:
        after += ["h + jnp.tanh({})", "(lambda y: jnp.where(h > 0, y, h))({})"]
    form = writer.one_of(*after)
    if "B" in form:
        form = form.replace("B", scope.leaf((m,)))
    scope.write(f"h = {form.replace('{}', expression)}")
    return m


def body(scope: Scope, n: int, keeps: bool, most: int = 2) -> int:
    """Writes one or more layers; where h must keep its columns, the last one gives them back."""
    writer, m = scope.writer, n
    for _ in range(writer.draw(st.integers(1, most))):
        m = step(scope, m)
    if keeps and m != n:
        scope.write(f"h = jnp.tanh(h @ {scope.weight((m, n))})")
        m = n
    return m


def step(scope: Scope, n: int) -> int:
    """Writes a layer or a nested function."""
    writer = scope.writer
    if writer.budget <= 0 or writer.draw(st.integers(0, 2)) == 0:
        return layer(scope, n)
    writer.budget -= 1
    forms = [jitted, checkpointed, scan, scan, scan]
    forms += [fori_loop, vmap_of_examples, vmap_of_weights, vmap_of_weights]
    if not scope.is_local:  # devices in different branches would wait for each other
        forms += [branches]
    if not writer.has_stops:  # JAX does not differentiate them in a rule twice
        forms += [custom_jvp]
        if not scope.in_rule:  # nor custom_vjp
            forms += [custom_vjp]
    if writer.is_sharded and scope.has_batch and not scope.is_local:
        forms += [shard_map] * 4 + [tensor_parallel] * 4
    return writer.one_of(*forms)(scope, n)


def define(scope: Scope, name: str, arguments: str, body: Scope, result: str) -> None:
    scope.write(f"def {name}({arguments}):")
    scope.write(*(f"    {line}" for line in (*body.lines, f"return {result}")))


def jitted(scope: Scope, n: int) -> int:
    name = scope.writer.name("jitted")
    inner = scope.inner()
    m = body(inner, n, keeps=False)
    define(scope, name, f"args{inner.number}, h", inner, "h")
    scope.write(f"h = jax.jit({name})({packed(inner.args)}, h)")
    return m


def checkpointed(scope: Scope, n: int) -> int:
    writer = scope.writer
    name = writer.name("layer")
    inner = scope.inner()
    m = body(inner, n, keeps=False)
    define(scope, name, f"args{inner.number}, h", inner, "h")
    options = [
        "",
        ", prevent_cse=False",
        ', policy=jax.checkpoint_policies.save_only_these_names("weight")',
    ]
    if not writer.is_complex:  # JAX cannot save a complex product (jax 0.10.2)
        options += [", policy=jax.checkpoint_policies.dots_saveable"]
    scope.write(f"h = jax.checkpoint({name}{writer.one_of(*options)})({packed(inner.args)}, h)")
    return m


def custom_jvp(scope: Scope, n: int) -> int:
    """Twice the derivative, so that a lost rule is noticed."""
    name = scope.writer.name("custom")
    inner = scope.inner(closes=False, in_rule=True)
    m = body(inner, n, keeps=False, most=1)
    define(scope, f"{name}_", f"args{inner.number}, h", inner, "h")
    scope.write(
        f"{name} = jax.custom_jvp({name}_)",
        f"def {name}_jvp(primals, tangents):",
        f"    y, dy = jax.jvp({name}_, primals, tangents)",
        "    return y, 2 * dy",
        f"{name}.defjvp({name}_jvp)",
        f"h = {name}({packed(inner.args)}, h)",
    )
    return m


def custom_vjp(scope: Scope, n: int) -> int:
    """Minus the derivative, so that a lost rule is noticed."""
    name = scope.writer.name("custom")
    inner = scope.inner(closes=False, in_rule=True)
    m = body(inner, n, keeps=False, most=1)
    define(scope, f"{name}_", f"args{inner.number}, h", inner, "h")
    scope.write(
        f"{name} = jax.custom_vjp({name}_)",
        f"{name}.defvjp(",
        f"    lambda args, h: ({name}_(args, h), (args, h)),",
        f"    lambda saved, dy: jax.vjp({name}_, *saved)[1](-dy),",
        ")",
        f"h = {name}({packed(inner.args)}, h)",
    )
    return m


def branches(scope: Scope, n: int) -> int:
    writer = scope.writer
    name = writer.name("branch")
    first, second = scope.inner(takes_args=False), scope.inner(takes_args=False)
    m = body(first, n, keeps=False, most=1)
    other = body(second, n, keeps=False, most=1)
    if other != m:
        second.write(f"h = jnp.tanh(h @ {second.weight((other, m))})")
    define(scope, f"{name}_a", "h", first, "h")
    define(scope, f"{name}_b", "h", second, "h")
    scope.write(
        writer.one_of(
            f"h = lax.cond(h.sum() > 0, {name}_a, {name}_b, h)",
            f"h = lax.switch((h.sum() > 0).astype(int), [{name}_a, {name}_b], h)",
            f"h = lax.switch(jnp.argmax(h[0]), [{name}_a, {name}_b, {name}_a], h)",
        )
    )
    return m


def scan(scope: Scope, n: int) -> int:
    writer = scope.writer
    name = writer.name("step")
    inner = scope.inner(length=writer.one_of(2, 3), takes_args=False, takes_carries=True)
    body(inner, n, keeps=True)
    carried, slices = f"carried{inner.number}", f"slices{inner.number}"
    ys = writer.one_of("None", "h", slices)
    inner.lines.insert(0, f"h, {carried} = carry")
    define(scope, name, f"carry, {slices}", inner, f"(h, {carried}), {ys}")
    function = writer.one_of(name, name, f"jax.checkpoint({name})")
    options = writer.one_of("", "", ", reverse=True", ", unroll=2")
    carry = f"(h, {packed(inner.carries)})"
    scope.write(
        f"(h, _), ys = lax.scan({function}, {carry}, {stacks(inner)},"
        f" length={inner.length}{options})"
    )
    if ys != "None" and scope.around is None:
        scope.write("outputs.append(ys)")
    return n


def fori_loop(scope: Scope, n: int) -> int:
    name = scope.writer.name("step")
    inner = scope.inner(takes_args=False, takes_carries=True)
    body(inner, n, keeps=True, most=1)
    inner.lines.insert(0, f"h, carried{inner.number} = carry")
    define(scope, name, "i, carry", inner, f"h, carried{inner.number}")
    scope.write(f"h, _ = lax.fori_loop(0, 2, {name}, (h, {packed(inner.carries)}))")
    return n


def vmap_of_examples(scope: Scope, n: int) -> int:
    writer = scope.writer
    name = writer.name("example")
    inner = scope.inner(has_batch=False)
    m = body(inner, n, keeps=False)
    axes = writer.one_of(0, 1)
    batch = "h[:, None]" if axes == 0 else "jnp.stack([h, 2 * h], 1)"
    define(scope, name, f"args{inner.number}, h", inner, "h")
    scope.write(f"h = jax.vmap({name}, in_axes=(None, {axes}))({packed(inner.args)}, {batch})")
    scope.write(f"h = {'h[:, 0]' if axes == 0 else 'h.sum(0)'}")
    return m


def vmap_of_weights(scope: Scope, n: int) -> int:
    writer = scope.writer
    name = writer.name("expert")
    inner = scope.inner(length=2, has_batch=False)
    m = body(inner, n, keeps=False)
    if not inner.slices:
        inner.slices["bias"] = (scope.weight((2, m)), 0)
        inner.write(f'h = jnp.tanh(h + slices{inner.number}["bias"][None])')
    define(scope, name, f"args{inner.number}, slices{inner.number}, h", inner, "h")
    axes = packed({key: str(axis) for key, (_, axis) in inner.slices.items()})
    given = packed({key: stack for key, (stack, _) in inner.slices.items()})
    out = writer.one_of(0, 1, 2)
    experts = f"jax.vmap({name}, in_axes=(None, {axes}, None), out_axes={out})"
    scope.write(f"h = jnp.tanh({experts}({packed(inner.args)}, {given}, h)).sum({out})")
    return m


def shard_map(scope: Scope, n: int) -> int:
    """The batch is split, weights are whole."""
    name = scope.writer.name("shard")
    inner = scope.inner(closes=False, is_local=True)
    m = body(inner, n, keeps=False)
    define(scope, name, f"args{inner.number}, h", inner, "h")
    scope.write(
        f'h = jax.shard_map({name}, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))'
        f"({packed(inner.args)}, h)"
    )
    return m


def tensor_parallel(scope: Scope, n: int) -> int:
    """Two layers whose hidden columns are split."""
    up, down = scope.weight((n, 4)), scope.weight((4, n))
    scope.write(
        "h = jax.shard_map(",
        '    lambda up, down, h: lax.psum(jnp.tanh(h @ up) @ down, "tensor"),',
        '    mesh=MESH, in_specs=(P(None, "tensor"), P("tensor"), P("data")), out_specs=P("data"),',
        f")({up}, {down}, h)",
    )
    return n


def linear(scope: Scope, n: int) -> str:
    """An expression that is linear in one weight: one contraction, maybe in nested functions."""
    writer = scope.writer
    if writer.budget <= 0 or writer.draw(st.integers(0, 3)) == 0:
        return contraction(scope, n)[0]
    writer.budget -= 1
    forms = [
        "jax.jit({f})({args}, {scanned}, h)",
        "jax.checkpoint({f})({args}, {scanned}, h)",
        "lax.scan(lambda _, s: (None, {f}({args}, s, h)), None, {scanned}, length=3)[1]",
        "jax.vmap({f}, (None, {axes}, None), {out}, axis_size=3)({args}, {mapped}, h)",
        "jax.vmap({f}, (None, None, 1), {out})({args}, {scanned}, jnp.stack([h, jnp.cos(h)], 1))",
    ]
    if not scope.is_local:
        forms += ["lax.cond(h.sum() > 0, {f}, {f}, {args}, {scanned}, h)"]
    if writer.is_sharded and scope.has_batch and not scope.is_local:
        forms += 4 * [
            'jax.shard_map({f}, mesh=MESH, in_specs=(P(), P(), P("data")), out_specs=P("data"))'
            "({args}, {scanned}, h)"
        ]
    form, name = writer.one_of(*forms), writer.name("f")
    inner = scope.inner(
        length=3 if "length" in form or "axis_size" in form else 0,
        closes="shard_map" not in form,
        is_local=scope.is_local or "shard_map" in form,
        has_batch=scope.has_batch and "vmap" not in form,
    )
    result = linear(inner, n)
    define(scope, name, f"args{inner.number}, slices{inner.number}, h", inner, result)
    return form.format(
        f=name,
        args=packed(inner.args),
        scanned=stacks(inner),
        axes=packed({key: str(axis) for key, (_, axis) in inner.slices.items()}),
        mapped=packed({key: stack for key, (stack, _) in inner.slices.items()}),
        out=writer.one_of(0, 1),
    )


def finished(writer: Writer, scope: Scope, n: int, result: str) -> Program:
    source = "\n".join(["def program(p, x):", *(f"    {line}" for line in scope.lines), result])
    batch = SHARDED_BATCH if "MESH" in source else writer.one_of(2, 3)
    return Program(source, writer.shapes, (batch, n), writer.draw(st.integers(0, 999)))


@st.composite
def programs(draw: Any) -> Program:
    """Programs of one to three layers or nested functions."""
    writer = Writer(draw, budget=3)
    scope = Scope(writer)
    n = writer.one_of(2, 3, 4)
    scope.write("h, outputs = x, []")
    body(scope, n, keeps=False, most=3)
    for name in list(writer.shapes):
        if writer.chance(8):
            scope.write(f'outputs.append(p["{name}"])')
    return finished(writer, scope, n, "    return h, outputs")


@st.composite
def linear_programs(draw: Any) -> Program:
    """Programs that return one contraction of one weight."""
    writer = Writer(draw, budget=2, is_linear=True)
    scope = Scope(writer)
    n = writer.one_of(2, 3, 4)
    scope.write("h = x")
    result = linear(scope, n)
    return finished(writer, scope, n, f"    return {result}")
