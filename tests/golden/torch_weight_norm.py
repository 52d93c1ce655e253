"""What PyTorch's weight_norm computes; run `python -m tests.golden.torch_weight_norm` to renew.

Every case trains one layer for ten steps in float64 and records, in PyTorch's layouts:
its inputs and targets, the initial g, v and bias, their first gradients, and their values
after the last step. `torch_weight_norm.npz` was made with torch 2.13.0 on a CPU.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
STEPS = 10
CASES = ("linear", "linear_whole", "linear_adam", "conv1d", "conv2d")


def run(case):
    """Trains the layer of `case` with PyTorch and returns the record, a dict of arrays."""
    import torch
    from torch.nn.utils.parametrizations import weight_norm

    torch.manual_seed(0)
    shapes = {"linear": (6, 5), "conv1d": (6, 3, 8), "conv2d": (6, 3, 7, 7)}
    x = torch.randn(shapes[case.split("_")[0]], dtype=torch.float64)
    layer = {
        "linear": lambda: torch.nn.Linear(5, 4),
        "conv1d": lambda: torch.nn.Conv1d(3, 4, 3, padding=1),
        "conv2d": lambda: torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
    }[case.split("_")[0]]()
    layer = weight_norm(layer.double(), dim=None if case == "linear_whole" else 0)
    target = torch.randn_like(layer(x))

    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    trained = {"g": g, "v": v, "bias": layer.bias}
    make = torch.optim.Adam if case == "linear_adam" else torch.optim.SGD
    momentum = {} if case == "linear_adam" else {"momentum": 0.9}
    optimizer = make(layer.parameters(), lr=0.1, **momentum)
    record = {"x": x, "target": target} | {k: p.detach().clone() for k, p in trained.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        ((layer(x) - target) ** 2).mean().backward()
        if step == 0:
            record |= {f"grad_{k}": p.grad.clone() for k, p in trained.items()}
        optimizer.step()
    record |= {f"last_{k}": p.detach() for k, p in trained.items()}
    return {k: np.asarray(x.numpy()) for k, x in record.items()}


def recorded(case):
    """The record of `case` in the committed file."""
    with np.load(FILE) as arrays:
        return {
            name.removeprefix(f"{case}."): arrays[name]
            for name in arrays.files
            if name.startswith(f"{case}.")
        }


if __name__ == "__main__":
    np.savez_compressed(FILE, **{f"{c}.{k}": x for c in CASES for k, x in run(c).items()})
