"""How many steps of a run fit into the wall time that it may take."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cluster
from experiments.logs import log
from experiments.programs import Programs
from experiments.trainer import State

SHARE = 0.9  # of the time is planned; the rest is for what varies, and for the last checkpoint


def shorten(programs: Programs, states: State, seconds: float) -> State:
    """States of a run that ends after so many steps as the seconds allow.

    One call of the compiled steps and one evaluation are timed, on a copy of the states. The run
    keeps whole rounds between evaluations, one at the least, and never takes more steps than
    the config says. The schedules of the optimizer are shortened with it.
    """
    config = programs.config
    begin = time.perf_counter()
    copy, ends = programs.steps(jax.tree.map(jnp.copy, states))
    jax.block_until_ready(ends)
    first_call = time.perf_counter()
    copy, ends = programs.steps(copy)
    jax.block_until_ready(ends)
    second_call = time.perf_counter()
    programs.metrics(copy)
    programs.norms(copy)
    end = time.perf_counter()
    calls = config.steps_per_eval // config.call_steps
    a_round = calls * (second_call - first_call) + (end - second_call)
    rounds = max(1, int(SHARE * (seconds - (end - begin)) / a_round))
    steps: int = cluster.of_first(min(config.steps, rounds * config.steps_per_eval))
    log.info("%d of %d steps fit into --config.minutes=%g", steps, config.steps, config.minutes)
    length = np.full(states.length.shape, steps, np.int32)  # the same in all processes
    length = jax.device_put(length, states.length.sharding)
    return states._replace(length=length)
