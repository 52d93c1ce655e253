"""The schema of every experiment: what a config file returns, and what the command line sets."""

# No `from __future__ import annotations`: ml_collections reads the types of the fields.
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from experiments.gains import scale_gains_by_fan_in
from experiments.networks.layers import ActivationNorm
from experiments.tasks import Task


class Update(enum.Enum):
    """The optimizers."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMAX = "adamax"


@dataclasses.dataclass(slots=True, kw_only=True)
class Optimizer:
    """How parameters are updated.

    Attributes:
      name: sgd, adam or adamax.
      learning_rate: until decay_from.
      momentum: of sgd, or β₁ of adam and adamax, until decay_from.
      late_momentum: the same from decay_from on; negative to change nothing.
      decay_from: step from which the learning rate falls linearly, to 0 after the last step;
        negative for never.
      clip: largest global norm of the gradients; larger ones are scaled down. 0 for any.
      eps: of adam and adamax, added to the denominator: m / (√(v + eps_root) + eps).
      eps_root: of adam, added under the root.
      fast_gains: with weight norm, multiply the updates of every gain by the square root of its
        fan-in: experiments.gains.
    """

    name: Update = Update.SGD
    learning_rate: float = 0.1
    momentum: float = 0.9
    late_momentum: float = -1.0
    decay_from: int = -1
    clip: float = 0.0
    eps: float = 1e-8
    eps_root: float = 0.0
    fast_gains: bool = False

    def __post_init__(self) -> None:
        """Checks the values, also after the command line has changed them."""
        _check_types(self, "optimizer.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum must lie in [0, 1), got {self.momentum}")
        if not self.late_momentum < 1:
            raise ValueError(f"optimizer.late_momentum must be below 1, got {self.late_momentum}")
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"optimizer.clip must not be negative, got {self.clip}")
        if self.late_momentum >= 0 > self.decay_from:
            raise ValueError("optimizer.late_momentum needs optimizer.decay_from")
        for name in ("eps", "eps_root"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"optimizer.{name} must not be negative, got {getattr(self, name)}"
                )
        if self.eps_root and self.name is not Update.ADAM:
            raise ValueError(f"optimizer.eps_root is of adam alone, not of {self.name.value}")

    def make(self, steps: int, length: int | jax.Array | None = None) -> GradientTransformation:
        """The optimizer for so many steps.

        Args:
          steps: that `decay_from` counts on.
          length: the steps that the run really takes; schedules are stretched or shortened to it.
        """
        rate: Any = self.learning_rate
        momentum: Any = self.momentum

        def decayed(step: jax.Array) -> jax.Array:
            left = (steps - step) / max(steps - self.decay_from, 1)
            return self.learning_rate * jnp.clip(left, 0, 1)

        def switched(step: jax.Array) -> jax.Array:
            return jnp.where(step < self.decay_from, self.momentum, self.late_momentum)

        if self.decay_from >= 0:
            rate = _stretched(decayed, steps, length)
        if self.late_momentum >= 0:
            momentum = _stretched(switched, steps, length)
        make, options = {
            Update.SGD: (optax.sgd, {"momentum": momentum}),
            Update.ADAM: (optax.adam, {"b1": momentum, "eps": self.eps, "eps_root": self.eps_root}),
            Update.ADAMAX: (optax.adamax, {"b1": momentum, "eps": self.eps}),
        }[self.name]
        if self.late_momentum >= 0:
            make = optax.inject_hyperparams(make)  # takes schedules of any argument
        before = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        behind = [scale_gains_by_fan_in()] if self.fast_gains else []
        return optax.chain(*before, make(rate, **options), *behind)


def _stretched(
    schedule: Callable[[jax.Array], jax.Array], steps: int, length: int | jax.Array | None
) -> optax.Schedule:
    """A schedule made for `steps`, run in `length` of them."""

    def stretched(count: Any) -> jax.Array:
        step = jnp.asarray(count, float)  # float64 where that is on
        return schedule(step if length is None else step * (steps / jnp.asarray(length, float)))

    return stretched


@dataclasses.dataclass(slots=True, kw_only=True)
class Mesh:
    """Over how many devices each network is spread: data · fsdp · tensor.

    Attributes:
      data: devices that share every batch, each with all weights.
      fsdp: devices that share every batch and the weights, which are fetched where they are used.
      tensor: devices that share the weights, and what is computed with them.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Checks the values."""
        _check_types(self, "mesh.")
        for field in dataclasses.fields(self):
            if (size := getattr(self, field.name)) < 1:
                raise ValueError(f"mesh.{field.name} must be positive, got {size}")

    @property
    def size(self) -> int:
        """The devices of one network."""
        return self.batch_parts * self.tensor

    @property
    def batch_parts(self) -> int:
        """The parts that every batch is split into."""
        return self.data * self.fsdp


class Start(enum.Enum):
    """Whether a process looks for others to train with."""

    OFF = "off"
    AUTO = "auto"
    ON = "on"


@dataclasses.dataclass(slots=True, kw_only=True)
class Cluster:
    """The processes that train together, each with devices of its own.

    Attributes:
      start: off for one process; on for several, which must find one another; auto to look for
        others where the environment tells of them.
      devices: that all processes have together; other numbers stop them. 0 for any, with off.
      timeout: seconds to wait for the others, at the start and when one does not answer any more.
    """

    start: Start = Start.OFF
    devices: int = 0
    timeout: int = 100

    def __post_init__(self) -> None:
        """Checks the values."""
        _check_types(self, "cluster.")
        if self.devices < 0:
            raise ValueError(f"cluster.devices must not be negative, got {self.devices}")
        if self.timeout < 1:
            raise ValueError(f"cluster.timeout must be positive, got {self.timeout}")
        if self.start is not Start.OFF and not self.devices:
            raise ValueError(
                "cluster.devices must say how many devices all processes have together, so that "
                "processes which do not find one another stop"
            )


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One training run.

    Attributes:
      task: data, network and loss; its fields are set by --config.task.FIELD.
      weight_norm: train g and v in place of the weights.
      in_optimizer: with weight norm, keep the weights as parameters, and g and v in the optimizer:
        wnjax.weight_normalized.
      fixed_scale: without weight norm, keep the scale s that initialization from data gives every
        weight as a constant, w = s·v, and train v. The authors' plain network is of that form: s
        multiplies the steps.
      v_std: with weight norm, the standard deviation of the entries of every v at the start, to
        which it is scaled; the smaller, the further a step turns it. 0 for that of the weights.
      norm: what normalizes activations: none, batch, mean_only or layer.
      init_examples: examples behind data-dependent initialization; 0 for none. Without weight
        norm, weights and biases are set to what they would be with it.
      optimizer: its fields are set by --config.optimizer.FIELD.
      batch_size: examples a step.
      steps: training steps; a multiple of steps_per_eval.
      minutes: wall time that the run may take, compiling included. One call is timed, and fewer
        steps are taken where all of them would take longer; the schedules of the optimizer end
        with them. 0 for any.
      steps_per_eval: steps between evaluations, each of which leaves a line in the record; a
        multiple of steps_per_call.
      steps_per_call: steps in one call of the compiled program; 0 for all between evaluations.
      unroll: write the steps of a call out instead of looping over them. Compiling takes
        longer, but XLA's convolutions on a CPU are several times slower inside a loop.
      evals_per_save: evaluations between checkpoints.
      train_examples: train on so many, the first ones; 0 for all.
      validation_examples: hold out so many of these, the last ones, and measure on them too.
      test_examples: test on so many, the first ones; 0 for all.
      ema_decay: of the moving average of the parameters that is evaluated; 0 for none.
      bfloat16: compute in bfloat16; parameters, norms and losses stay in float32.
      mesh: its fields are set by --config.mesh.FIELD.
      cluster: its fields are set by --config.cluster.FIELD.
      seeds: networks trained side by side, from seed on upwards.
      seed: of the first network: its initialization and its order of examples.
      data_dir: where downloaded data is or goes.
      profile: the first step and the step after the last one to be profiled; (0, 0) for none.
      tensorboard: write the metrics for TensorBoard too; needs the package tensorboardX.
      published: the paper's value of the final metric, for reports; negative for none.
    """

    task: Task
    weight_norm: bool = False
    in_optimizer: bool = False
    fixed_scale: bool = False
    v_std: float = 0.0
    norm: ActivationNorm = ActivationNorm.NONE
    init_examples: int = 0
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    batch_size: int = 64
    steps: int = 400
    minutes: float = 0.0
    steps_per_eval: int = 20
    steps_per_call: int = 1
    unroll: bool = False
    evals_per_save: int = 1
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0
    ema_decay: float = 0.0
    bfloat16: bool = False
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    cluster: Cluster = dataclasses.field(default_factory=Cluster)
    seeds: int = 1
    seed: int = 0
    data_dir: str = "data"
    profile: tuple[int, int] = (0, 0)
    tensorboard: bool = False
    published: float = -1.0

    def __post_init__(self) -> None:
        """Checks the values, also after the command line has changed them."""
        _check_types(self)
        self._check_ranges()
        for many, few in (("steps", "steps_per_eval"), ("steps_per_eval", "steps_per_call")):
            if (size := getattr(self, few)) and getattr(self, many) % size:
                raise ValueError(
                    f"{many} must be a multiple of {few}, got {getattr(self, many)} and {size}"
                )
        if self.in_optimizer and (not self.weight_norm or self.v_std):
            raise ValueError("in_optimizer needs weight_norm, and v_std=0: v begins as the weight")
        if self.fixed_scale and (self.weight_norm or not self.init_examples):
            raise ValueError("fixed_scale needs weight_norm=False, and init_examples for the scale")
        if self.optimizer.fast_gains and not self.weight_norm:
            raise ValueError("optimizer.fast_gains needs weight_norm: plain weights have no gains")
        if self.norm not in self.task.norms:
            names = ", ".join(norm.value for norm in self.task.norms)
            raise ValueError(f"norm must be one of {names} for this task, got {self.norm.value}")
        if self.batch_size % self.mesh.batch_parts:
            raise ValueError(
                f"batch_size must be a multiple of mesh.data · mesh.fsdp, got {self.batch_size} "
                f"and {self.mesh.batch_parts}"
            )
        first, last = self.profile
        if not 0 <= first <= last <= self.steps:
            raise ValueError(f"profile must be two steps in order, got {self.profile}")

    @property
    def call_steps(self) -> int:
        """The steps in one call of the compiled program."""
        return self.steps_per_call or self.steps_per_eval

    def _check_ranges(self) -> None:
        positive = "batch_size", "steps", "steps_per_eval", "evals_per_save"
        for name in (*positive, "seeds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        examples = "init_examples", "train_examples", "validation_examples", "test_examples"
        for name in (*examples, "steps_per_call"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.v_std < math.inf:
            raise ValueError(f"v_std must not be negative, got {self.v_std}")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise ValueError(f"seed must not be negative or beyond 31 bits, got {self.seed}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config, some of them changed; a dict changes fields of a part, such as the task.

    >>> merge({"steps": 9, "mesh": Mesh(data=2)}, {"mesh": {"fsdp": 4}})
    {'steps': 9, 'mesh': Mesh(data=2, fsdp=4, tensor=1)}
    """
    parts = {
        name: dataclasses.replace(base[name], **inner)
        for name, inner in changes.items()
        if isinstance(inner, Mapping)
    }
    return {**base, **changes, **parts}


def _check_types(config: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(field.type, type):
            continue  # a generic type
        kinds = (int, float) if field.type is float else (field.type,)
        if not isinstance(value, kinds):
            raise TypeError(
                f"{prefix}{field.name} must be of type {field.type.__name__}, got {value!r}"
            )


Variants = Mapping[str, Mapping[str, Any]]  # by name, fields of Config

VARIANTS: Variants = {
    "plain": {},
    "weight_norm": {"weight_norm": True},
    "weight_norm_init": {"weight_norm": True, "init_examples": 500},
    "batch_norm": {"norm": ActivationNorm.BATCH},
    "mean_only": {"norm": ActivationNorm.MEAN_ONLY},
    "weight_norm_mean_only": {
        "weight_norm": True,
        "norm": ActivationNorm.MEAN_ONLY,
        "init_examples": 500,
    },
}
"""Those of the paper; config files say which of them they have, and what else they set."""
