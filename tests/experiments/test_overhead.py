"""What is compared computes the same; tables and pictures say what was measured."""

import json

import chex
import jax
import numpy as np
import optax
import pytest
from PIL import Image

import wnjax
from experiments import overhead, peers, stopwatch
from experiments.networks.classifiers import MLP, ConvPoolCNN
from experiments.networks.transformer import Transformer
from experiments.peers import IMPLEMENTATIONS
from experiments.problems import NETWORKS, Network, images, sequences
from experiments.stopwatch import Measurement

TINY = {
    "mlp": Network(MLP((8, 6)), images(5), (4, 8)),
    "convpool": Network(ConvPoolCNN((4, 6, 6), dropout=0.0, noise=0.0), images(16, 16, 3), (2,)),
    "transformer": Network(
        Transformer(layers=2, width=8, heads=2, hidden=16, vocabulary=11, length=6),
        sequences(6, 11),
        (3,),
    ),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    """Optax and flax promote dtypes in training."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def problems():
    """The tiny problem of every network."""
    return {name: network.problem(network.sizes[0]) for name, network in TINY.items()}


def first_loss(built):
    """The loss before the first step."""
    if isinstance(built, peers.Eager):
        return built.step()
    # Only the loss is asked for: gradients and Adam are traced, but not compiled.
    loss = jax.jit(lambda *args: built.step(*args)[1])
    return float(loss(built.state, built.inputs, built.labels))


@pytest.fixture(scope="module")
def plain_losses(problems):
    """The plain network's loss in every problem."""
    return {
        model: first_loss(IMPLEMENTATIONS["plain"].build(problem))
        for model, problem in problems.items()
    }


def build(name, problem):
    # PyTorch alone is no dependency of the tests: it takes gigabytes. CI installs it.
    if not IMPLEMENTATIONS[name].is_installed():
        pytest.skip(f"{IMPLEMENTATIONS[name].package} is not installed")
    return IMPLEMENTATIONS[name].build(problem)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "plain"])
def test_the_function_is_the_plain_one(name, model, problems, plain_losses):
    """At the start, and of all that should; the others say in the registry that they do not."""
    loss = first_loss(build(name, problems[model]))
    assert np.isclose(loss, plain_losses[model], rtol=1e-5) == IMPLEMENTATIONS[name].keeps
    assert np.isfinite(loss)


def test_weight_norms_take_the_same_step(problems):
    """To rounding, which Adam makes as large as a step where a gradient is next to nothing."""

    def params_after(name):
        training = build(name, problems["mlp"])
        (params, _, _), _ = jax.jit(training.step)(*training[1:])
        return params

    expected = params_after("wnjax-fold")
    for name in ("wnjax-wrap", "wnjax-wrap-unordered", "naive"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2.1 * peers.LEARNING_RATE),
            params_after(name),
            expected,
        )


@pytest.mark.parametrize("model", TINY)
def test_the_optimizer_takes_the_step_of_the_nodes(model, problems, monkeypatch):
    """By gradient descent, whose steps are as exact as the gradients."""
    monkeypatch.setattr(peers.optax, "adam", optax.sgd)
    monkeypatch.setattr(peers, "LEARNING_RATE", 0.1)

    def params_after(name):
        training = build(name, problems[model])
        return jax.jit(training.step)(*training[1:])[0][0]

    weights, start = wnjax.fold(params_after("wnjax-fold")), problems[model].params
    chex.assert_trees_all_close(params_after("wnjax-optimizer"), weights, rtol=1e-5, atol=1e-5)
    moves = jax.tree.map(lambda new, old: abs(new - old).max(), weights, start)
    assert max(jax.tree.leaves(moves)) > 1e-2


def test_only_wrap_itself_orders_gradients(problems):
    def is_ordered(name):
        training = build(name, problems["mlp"])
        return " wait " in str(jax.make_jaxpr(training.step)(*training[1:]))

    assert is_ordered("wnjax-wrap")
    assert not is_ordered("wnjax-wrap-unordered")


@pytest.mark.parametrize("model", TINY)
def test_every_layer_is_normalized_and_nothing_else(model, problems):
    nodes, _, _ = build("wnjax-wrap", problems[model]).state
    kernels = jax.tree_util.tree_leaves_with_path(problems[model].params)
    paths = ["/".join(key.key for key in path) for path, _ in kernels]
    assert set(wnjax.norms(nodes)) == {path for path in paths if path.endswith("/kernel")}


@pytest.mark.parametrize(
    ("model", "numbers", "outputs"),
    [
        ("mlp", (784 + 3 * 1024 + 10) * 1024 + (4 * 1024 + 10), (2, 10)),
        (
            "convpool",
            # 3x3 kernels, 1x1 kernels, the dense one; biases.
            9 * ((3 + 2 * 96) * 96 + (96 + 3 * 192) * 192)
            + (2 * 192 + 10) * 192
            + (3 * 96 + 6 * 192 + 10),
            (2, 10),
        ),
        (
            "transformer",
            # The tables and the head; of each block four projections, the dense layers, and as
            # many biases as make 9 widths with layer normalization; the last normalization.
            (256 + 64 + 256) * 512
            + 256
            + 4 * (4 * 512**2 + 2 * 512 * 2048 + 2048 + 9 * 512)
            + 2 * 512,
            (2, 64, 256),
        ),
    ],
)
def test_networks_are_of_the_size_that_is_claimed(model, numbers, outputs):
    network = NETWORKS[model]
    inputs, labels = jax.eval_shape(lambda: network.batch(2))
    logits, variables = jax.eval_shape(
        lambda x: network.model.init_with_output(jax.random.key(0), x, train=True), inputs
    )
    assert (logits.shape, labels.shape) == (outputs, outputs[:-1])
    assert sum(x.size for x in jax.tree.leaves(variables)) == numbers


def test_noise_and_dropout_are_for_training_only(problems):
    plain, params, x, _ = problems["convpool"]

    def apply(train, seed=0, **fields):
        rngs = {name: jax.random.key(seed) for name in ("noise", "dropout")}
        return plain.clone(**fields).apply({"params": params}, x, train=train, rngs=rngs)

    for on in ({"noise": 0.1}, {"dropout": 0.5}):
        assert (apply(True, 0, **on) != apply(True, 1, **on)).any()
        np.testing.assert_array_equal(apply(False, **on), apply(True))


def test_a_token_does_not_see_the_next(problems):
    model, params, tokens, _ = problems["transformer"]
    changed = tokens.at[:, 3].add(1) % model.vocabulary
    apply = jax.jit(lambda x: model.apply({"params": params}, x, train=True))
    before, after = map(apply, (tokens, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(axis=-1).all()


def test_compiling_is_fresh_and_leaves_the_problem_alone(problems):
    builds, problem = [], problems["mlp"]

    def plain(problem):
        builds.append(IMPLEMENTATIONS["plain"].build(problem))
        return builds[-1]

    chosen = {"plain": peers.Implementation("counted", plain)}
    compiled = stopwatch.compile_all(chosen, problem)["plain"]
    assert len({id(built.step) for built in builds}) == stopwatch.COMPILATIONS
    assert compiled.program(1) > compiled.program(5)  # it goes on from where it was
    assert not any(x.is_deleted() for x in jax.tree.leaves(problem[1:]))
    assert min(compiled[1:]) > 0


def test_every_round_is_everyones_in_an_order_that_is_drawn():
    def run():
        calls = []
        programs = {name: lambda steps, name=name: calls.append(name) or 0.0 for name in "abcd"}
        seconds = stopwatch.time_all(programs, seconds=60, repeats=5)
        assert [len(times) for times in seconds.values()] == [5] * 4
        return ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]

    rounds = run()
    assert rounds[:2] == ["abcd"] * 2  # to warm up
    assert {"".join(sorted(names)) for names in rounds} == {"abcd"}
    assert len(set(rounds[2:])) > 1
    assert run() == rounds


def test_a_program_too_slow_to_warm_up(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: 10.0 * next(clock))
    calls = []
    programs = {name: lambda steps: calls.append(steps) or 0.0 for name in "ab"}
    seconds = stopwatch.time_all(programs, seconds=20, repeats=None)
    assert seconds == {"a": [10.0] * 3, "b": [10.0] * 3}
    assert calls == [1] * 6


@pytest.fixture
def cell():
    """Measurements with known ratios: a slow round slows both."""
    return {
        "plain": Measurement("mlp", 8, "plain", [0.01, 0.02, 0.01], 0.5, 100.0, 50),
        "naive": Measurement("mlp", 8, "naive", [0.012, 0.022, 0.014], 1.0, 150.0, 0),
        "torch-plain": Measurement("mlp", 8, "torch-plain", [0.1] * 3, None, None, None),
        "torch": Measurement("mlp", 8, "torch", [0.2] * 3, None, None, None),
    }


def test_table(cell):
    lines = [" ".join(line.split()) for line in overhead.table(cell).splitlines()]
    assert lines[0] == "step time quartiles ms a step compile time bytes memory against"
    assert lines[2:] == [
        "plain 1.00 1.00 to 1.00 10.0 1.00 1.00 1.00 plain",
        # Ratios of 1.2, 1.1 and 1.4, each of one round.
        "naive 1.20 1.15 to 1.30 14.0 2.00 1.50 0.00 plain",
        "torch-plain 1.00 1.00 to 1.00 100.0 - - - torch-plain",
        "torch 2.00 2.00 to 2.00 200.0 - - - torch-plain",
    ]
    assert overhead.title(cell) == "mlp, batch 8 (3 rounds)"


def test_without_temporary_memory_there_is_no_ratio(cell):
    cell["plain"] = cell["plain"]._replace(temporary_bytes=0)
    assert stopwatch.ratios(cell, "naive").memory is None


def test_the_command_line(tmp_path, capsys, monkeypatch):
    """Tiny networks all the way: tables, a picture, and numbers that are JSON."""
    monkeypatch.setattr(stopwatch, "COMPILATIONS", 1)
    out = tmp_path / "new" / "overhead.png"
    arguments = ["--models=mlp", "--implementations=wnjax-wrap", "--repeats=3"]
    assert overhead.main([*arguments, f"--out={out}"], TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "batch" in line][:2] == [
        "mlp, batch 4 (3 rounds)",
        "mlp, batch 8 (3 rounds)",
    ]
    assert [line.split()[0] for line in lines[4:6]] == ["plain", "wnjax-wrap"]
    assert lines[-2:] == [f"picture: {out}", f"numbers: {out.with_suffix('.json')}"]

    with Image.open(out) as picture:
        assert picture.size == (600, 840)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert len(numbers["measurements"]) == 4
    for one in numbers["measurements"]:
        assert min(len(one["seconds"]), one["compile_seconds"], one["bytes_accessed"]) > 0
    assert {"wnjax", "jax", "python"} <= set(numbers["versions"])
    assert numbers["device"].startswith("cpu, ")
    assert numbers["skipped"] == {}


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert overhead.choose(["naive", "paramax", "torch"]) == (
        ["plain", "naive"],
        {"paramax": "paramax", "torch": "torch"},
    )
    assert overhead.main(["--implementations=paramax,torch"]) == 2
    out, err = capsys.readouterr()
    assert out == "skipped: paramax (pip install paramax)\nskipped: torch (pip install torch)\n"
    assert err == "error: none of the implementations is installed\n"


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--models=mlp,cnn", "--models: unknown 'cnn'; there are: mlp, convpool, transformer"),
        ("--implementations=wn", "--implementations: unknown 'wn'; there are: plain, wnjax-fold"),
        ("--batches=8,0", "--batches: must be positive, got 0"),
        ("--batches=8,many", "--batches: invalid sizes value: '8,many'"),
        ("--repeats=-1", "--repeats: must be positive, got -1"),
        ("--out=a.svg", "--out must be a file that ends in .png, got a.svg"),
    ],
)
def test_mistakes_on_the_command_line(argument, text, capsys):
    with pytest.raises(SystemExit):
        overhead.main([argument])
    assert text in capsys.readouterr().err


def test_help_says_what_is_compared(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"{name} " in out and one.about in out for name, one in IMPLEMENTATIONS.items())
