"""Experiments with wnjax: one trainer, run from the files in configs/."""

from importlib.util import find_spec

# Every command needs these. Packages of single data sets are imported where they are used.
NEEDED = (
    *("jax", "flax", "optax", "chex", "orbax", "ml_collections", "matplotlib", "pooch"),
    *("tabulate", "tqdm"),
)
if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise SystemExit(
        f"error: the experiments need {', '.join(missing)}: pip install '.[experiments]' in a "
        "clone of wnjax"
    )
