# ---
# jupytext: {text_representation: {extension: .py, format_name: percent}}
# kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Why it optimizes better
#
# The argument of [Salimans & Kingma 2016](https://arxiv.org/abs/1602.07868), section 2.1, measured
# on a small problem: where it holds, and where it does not. With w = g·v/‖v‖, the gradient of v is
# ∇v = (g/‖v‖) M ∇w with M = I − w wᵀ/‖w‖²: that of w, scaled, without its part along w. So:
#
# 1. **Conditioning.** If C is the covariance of ∇w over examples, that of ∇v is (g/‖v‖)² M C M.
#    Where w is close to the dominant eigenvector of C, this takes the largest eigenvalue away, and
#    what is left is closer to a multiple of the identity.
# 2. **Growth.** A step of plain SGD is orthogonal to v, so that ‖v + Δv‖² = ‖v‖² + ‖Δv‖². v gets
#    longer, fast if steps are large; and the longer v is, the less a step turns it.
# 3. **Learning rate.** One that is too large makes itself smaller: the choice matters less.
#
# One layer of 16 linear neurons predicts the lower half of a handwritten digit from its upper half
# (the four middle columns of each; 1,797 digits). The inputs, from 0 to 1, are not centered: the
# mean image dominates the covariance. The weights start from N(0, 0.05²), as the paper's do.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import wnjax

images = jnp.asarray(load_digits().images[:, :, 2:6] / 16, jnp.float32)
x, y = images[:, :4].reshape(-1, 16), images[:, 4:].reshape(-1, 16)


def layer(params, x):
    return x @ params["kernel"] + params["bias"]


def loss(fn, params, x, y):
    return 0.5 * jnp.mean(jnp.sum((fn(params, x) - y) ** 2, axis=-1))


RATES, SEEDS, STEPS = np.geomspace(0.01, 10, 13, dtype=np.float32), 7, 200
kernels = 0.05 * jax.random.normal(jax.random.key(1), (SEEDS, 16, 16))
starts = {"kernel": kernels, "bias": jnp.zeros((SEEDS, 16))}
batches_of_100 = jax.random.randint(jax.random.key(2), (SEEDS, STEPS, 100), 0, len(x))
axes = wnjax.infer_axes(layer)(jax.tree.map(lambda p: p[0], starts), x)
wn_layer = wnjax.wrap(layer)


@jax.jit(static_argnums=(0, 1))
def train(make_optimizer, fn):
    """The parameters before every step and after the last: (rates, seeds, steps + 1, ...)."""

    def run(rate, params, batches):
        optimizer = make_optimizer(rate)

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss, argnums=1)(fn, params, x[batch], y[batch])
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), params

        params = params if fn is layer else wnjax.weight_norm(params, axes)
        (last, _), history = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return jax.tree.map(lambda h, p: jnp.append(h, p[None], axis=0), history, last)

    over_seeds = jax.vmap(run, in_axes=(None, 0, 0))
    return jax.vmap(over_seeds, in_axes=(0, None, None))(RATES, starts, batches_of_100)


plain, normalized = train(optax.sgd, layer), train(optax.sgd, wn_layer)

# %% [markdown]
# ## 1. Conditioning
#
# At several moments of training with learning rate 0.1, for every neuron: the covariances of the
# gradients of all examples, and their eigenvalues. Lines are medians over 16 neurons and seven
# seeds, bands their quartiles.

# %% mystnb={"image": {"alt": "Cosine, condition numbers and eigenvalues"}}
MOMENTS = np.array([0, 1, 2, 5, 10, 20, 50, 100, 200])


def gradient_covariances(params):
    """Of ∇w and of ∇v, (neurons, 16, 16) each, and the variance of ∇g, (neurons,)."""

    def per_example(fn, params):
        one = jax.grad(lambda p, x, y: loss(fn, p, x[None], y[None]))
        return jax.vmap(one, in_axes=(None, 0, 0))(params, x, y)["kernel"]

    covariance = jax.vmap(lambda grads: jnp.cov(grads, rowvar=False), in_axes=2)
    of_w, of_gv_leaf = per_example(layer, wnjax.fold(params)), per_example(wn_layer, params)
    return covariance(of_w), covariance(of_gv_leaf.v), of_gv_leaf.g.var(0, ddof=1)[0]


params = jax.tree.map(lambda h: h[4, :, MOMENTS], normalized)  # RATES[4] is 0.1
measured = jax.jit(jax.vmap(jax.vmap(gradient_covariances)))(params)
c_w, c_v, var_g = (np.asarray(c, np.float64) for c in measured)
w = np.asarray(wnjax.fold(params)["kernel"], np.float64).swapaxes(-1, -2)
w /= np.linalg.norm(w, axis=-1, keepdims=True)
m = np.eye(16) - w[..., :, None] * w[..., None, :]
scale = np.asarray(wnjax.norms(params)["kernel"]["scale"])[:, :, 0, :, None, None]  # g/‖v‖
assert np.allclose(c_v, scale**2 * (m @ c_w @ m), rtol=1e-3, atol=1e-5 * c_v.max())

values_w, vectors = np.linalg.eigh(c_w)
values_v = np.linalg.eigvalsh(c_v / scale**2)[..., 1:]  # without the 0 along w
cosine = np.abs(np.sum(w * vectors[..., -1], axis=-1))
condition_w, condition_v = (e[..., -1] / e[..., 0] for e in (values_w, values_v))
peak = int(np.argmax(np.median(cosine, axis=(1, 2))))

BLUE, ORANGE, GREEN, PINK = ({"color": c} for c in ("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
OVER_STEPS = {"xscale": "symlog", "xlabel": "step", "xlim": (0, STEPS)}


def line(axis, xs, values, low=25, high=75, **style):
    """The median of `values`, whose first axis is that of `xs`, and a band of percentiles."""
    values = np.percentile(np.reshape(values, (len(xs), -1)), (50, low, high), axis=1)
    axis.plot(xs, values[0], **style)
    axis.fill_between(xs, *values[1:], color=style["color"], alpha=0.2, linewidth=0)


figure, (left, center, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
line(left, MOMENTS, cosine, color="black")
line(center, MOMENTS, condition_w, label="∇w", **BLUE)
line(center, MOMENTS, condition_v, label="∇v", **ORANGE)
line(right, np.arange(1, 17), values_w[peak].reshape(-1, 16).T[::-1], label="∇w", **BLUE)
line(right, np.arange(1, 16), values_v[peak].reshape(-1, 15).T[::-1], label="∇v·‖v‖/g", **ORANGE)
left.set(ylabel="|cos(w, dominant eigenvector)|", ylim=(0, 1), **OVER_STEPS)
center.set(ylabel="condition number of the covariance", ylim=(0, 500), **OVER_STEPS)
right.set(ylabel=f"eigenvalue, step {MOMENTS[peak]}", yscale="log", xlabel="rank", xticks=[1, 16])
center.legend()
right.legend()
plt.show()

gain = np.median(condition_w / condition_v, axis=(1, 2))
share = np.median(var_g / values_w[..., -1], axis=(1, 2))
for step, g, s in zip(MOMENTS, gain, share, strict=True):
    print(f"{step:3} steps: condition number {g:.1f} times lower; Var ∇g {s:.2f} of top eigenvalue")
assert gain[peak] > 1.6 > 1.2 * max(gain[0], gain[-1])
assert share[peak] > 0.4 > 2 * max(share[0], share[-1])

# %% [markdown]
# - At the start w points anywhere, and little is gained. Nothing is lost: on fewer directions the
#   largest eigenvalue of a matrix is no larger, and the smallest no smaller.
# - A few steps later w is mostly a sum of gradients, and near their dominant eigenvector. Of the
#   largest eigenvalue about 1 − cos² is left, of the others nearly all. This is the argument.
# - It does not last. The weights go on to what is harder to learn; the gain goes with the cosine.
# - What ∇v lacks has not gone away: it is the gradient of g, the part of ∇w along w.
#
# ## 2. Growth
#
# If every step is orthogonal to v, the last ‖v‖² is the first plus the sum of all ‖Δv‖². Momentum
# adds gradients at older v, and Adam scales every coordinate by itself: there the law fails.

# %%
adam = train(optax.adam, wn_layer)
momentum = train(lambda rate: optax.sgd(rate, momentum=0.9), wn_layer)
law = {}
for name, history in {"SGD": normalized, "momentum": momentum, "Adam": adam}.items():
    v = np.asarray(history["kernel"].v[4], np.float64)
    norm2, growth = np.sum(v**2, axis=-2), np.sum(np.diff(v, axis=1) ** 2, axis=(1, -2))
    law[name] = norm2[:, -1] / (norm2[:, 0] + growth)
    falls = np.mean(norm2[:, 1:] < norm2[:, :-1] * (1 - 1e-6))
    print(f"{name:8}  ‖v‖² / (‖v₀‖² + Σ‖Δv‖²) {np.median(law[name]):7.4f};  ‖v‖ falls {falls:.0%}")
assert np.abs(law["SGD"] - 1).max() < 1e-5  # rounding, over 200 steps
assert min(law["momentum"].min(), law["Adam"].min()) > 1.1

# %% [markdown]
# To first order, SGD turns w as plain SGD does at (g/‖v‖)² times its learning rate, the effective
# one. Plain SGD diverges above 2/λ, λ being the top eigenvalue of the inputs' second moments.

# %% mystnb={"image": {"alt": "Length of v and effective learning rate"}}
inputs = np.pad(x, [(0, 0), (0, 1)], constant_values=1)
limit = 2 / np.linalg.eigvalsh(inputs.T @ inputs / len(x))[-1]
lengths = jax.tree.map(lambda n: np.moveaxis(n, 2, 1), wnjax.norms(normalized)["kernel"])
effective = RATES[:, None, None, None, None] * lengths["scale"] ** 2

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for i, color in zip((2, 4, 6, 7), (GREEN, BLUE, PINK, ORANGE), strict=True):
    line(left, np.arange(STEPS + 1), lengths["v"][i], **color)
    line(right, np.arange(STEPS + 1), effective[i], label=f"learning rate {RATES[i]:.2f}", **color)
right.axhline(limit, color="black", linestyle="--", label="2/λ")
left.set(ylabel="‖v‖", yscale="log", **OVER_STEPS)
right.set(ylabel="effective learning rate", yscale="log", **OVER_STEPS)
right.legend()
plt.show()

ends = np.median(effective[:, -1], axis=(1, 2, 3))
assert limit > ends[4:7].max() < 1.5 * ends[4:7].min()
assert ends[7] < 0.5 * ends[4]

# %% [markdown]
# - From 0.10 to 0.32, just above 2/λ, all end at nearly the same effective rate, below 2/λ.
# - At 0.56 the first steps overshoot. v never gets shorter, and the layer then learns slowly.
#
# ## 3. Learning rate
#
# The loss on all digits after the last step: medians and ranges of seven seeds. Lines that leave at
# the top diverge. For "v alone", g and the biases are trained at 0.1, whatever the rate of v.


# %% mystnb={"image": {"alt": "Loss over learning rate, for SGD and Adam"}}
def v_alone(rate):
    tenth = optax.sgd(0.1)
    return optax.multi_transform({"g": tenth, "v": optax.sgd(rate), "other": tenth}, wnjax.labels)


runs = [
    ("plain", plain, BLUE),
    ("weight norm", normalized, ORANGE),
    ("v alone", train(v_alone, wn_layer), GREEN),
    ("plain", train(optax.adam, layer), BLUE),
    ("weight norm", adam, ORANGE),
]
figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
medians = []
for i, (label, history, color) in enumerate(runs):
    last = jax.tree.map(lambda h: h[:, :, -1], history)
    fn = layer if label == "plain" else wn_layer
    losses = jax.vmap(jax.vmap(lambda params, fn=fn: loss(fn, params, x, y)))(last)
    losses = np.where(losses < 1.5, losses, 1.5)  # NaN too
    line(panels[i // 3], RATES, losses, 0, 100, label=label, **color)
    medians.append(np.median(losses, axis=1))
panels[0].axvline(limit, color="black", linestyle="--", label="2/λ")
for axis, name in zip(panels, ("SGD", "Adam"), strict=True):
    axis.set(xscale="log", xlabel=f"learning rate of {name}", ylabel="loss", ylim=(0.7, 1.2))
    axis.legend()
plt.show()

sgd, wn, alone, adam_plain, adam_wn = medians
assert sgd[5] == sgd.min() < 0.6 * sgd[6:].min()  # RATES[6] is just above 2/λ
assert np.sum(wn < 1.1 * sgd.min()) > 1 + np.sum(sgd < 1.1 * sgd.min())
assert wn.min() > 0.97 * sgd.min()
assert wn[9:].min() > 1.3 * alone.max()
assert (wn[:4] > sgd[1:5]).all()
assert adam_wn.min() > 0.98 * adam_plain.min()
assert adam_wn[6:].min() > 1.1 * adam_plain[6:].max()

# %% [markdown]
# - Plain SGD is best just below 2/λ, and diverges above. With weight norm more than twice as wide a
#   range of learning rates gets within 10 % of that. The best loss is no better.
# - g and the biases end that range. They have no such brake, and g took over much of the top
#   eigenvalue. With these at 0.1, no learning rate of v up to 10 diverges.
# - Small ones gain less by weight norm than by being 1.8 times as large: g grows before v does.
# - Adam sets the size of its steps itself. Weight norm gains nothing with it here, and loses where
#   learning rates are large. For networks, see [the experiments](../experiments.md).
