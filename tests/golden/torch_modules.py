"""PyTorch modules with weight norm; run `python -m tests.golden.torch_modules` to renew.

Of every module, by both of PyTorch's ways to normalize: its state dict, an input and the output,
and the state dict after a step of SGD at rate 0.1 on the mean square of output minus target.
`torch_modules.npz` was made with torch 2.13.0 on a CPU.
"""

import warnings
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
APIS = ("weight_g", "parametrizations")
# name: (module, its arguments, dim, the shape of the input)
LAYERS = {
    "linear": ("Linear", (5, 4), {}, 0, (3, 5)),
    "linear_dim1": ("Linear", (4, 4), {}, 1, (3, 4)),
    "linear_whole": ("Linear", (5, 4), {}, None, (3, 5)),
    "conv1d": (
        "Conv1d",
        (4, 6, 3),
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
        0,
        (2, 4, 9),
    ),
    "conv2d": (
        "Conv2d",
        (2, 4, (3, 2)),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
        0,
        (2, 2, 7, 6),
    ),
    "conv3d": ("Conv3d", (2, 3, (2, 3, 2)), {"padding": (0, 1, 1)}, 0, (2, 2, 4, 3, 4)),
    "conv_transpose1d": (
        "ConvTranspose1d",
        (6, 4, 4),
        {"stride": 3, "padding": 1, "output_padding": 2, "dilation": 2},
        0,
        (2, 6, 5),
    ),
    "conv_transpose1d_dim1": ("ConvTranspose1d", (3, 3, 4), {"stride": 2}, 1, (2, 3, 5)),
    "conv_transpose1d_taps": ("ConvTranspose1d", (3, 3, 4), {"stride": 2}, 2, (2, 3, 5)),
    "conv_transpose2d": (
        "ConvTranspose2d",
        (3, 3, (3, 2)),
        {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)},
        0,
        (2, 3, 4, 3),
    ),
    "conv_transpose3d": ("ConvTranspose3d", (3, 2, 2), {"stride": 2}, 0, (1, 3, 2, 3, 2)),
    "conv_transpose1d_groups": (
        "ConvTranspose1d",
        (4, 6, 4),
        {"stride": 2, "padding": 1, "groups": 2},
        0,
        (2, 4, 5),
    ),
    "conv_transpose2d_groups": (
        "ConvTranspose2d",
        (4, 4, 3),
        {"stride": 2, "dilation": 2, "groups": 2},
        0,
        (1, 4, 3, 3),
    ),
    "conv_transpose3d_groups": ("ConvTranspose3d", (2, 4, 2), {"groups": 2}, 0, (1, 2, 2, 2, 2)),
}
CASES = (*LAYERS, "positional", "generator", "sequence", "codec", "attention")


def normalized(module, dim, api, name="weight"):
    """`module` with weight norm, and lengths that are not those of v."""
    import torch
    from torch.nn import utils

    if api == "weight_g":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "deprecated"
            module = utils.weight_norm(module, name, dim)
        g = getattr(module, f"{name}_g")
    else:
        module = utils.parametrizations.weight_norm(module, name, dim)
        g = getattr(module.parametrizations, name).original0
    with torch.no_grad():
        g.mul_(1 + torch.rand_like(g))
    return module


def positional(api):
    """The positional embedding of wav2vec2: a convolution with a g for each tap, an even number."""
    from torch import nn

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = normalized(nn.Conv1d(4, 4, 6, padding=3, groups=2), 2, api)

        def forward(self, x):
            return x + nn.functional.gelu(self.conv(x)[..., :-1])

    return Positional()


def generator(api):
    """A vocoder's generator in the manner of HiFi-GAN: upsampling, and stacks of residuals."""
    from torch import nn
    from torch.nn.functional import leaky_relu

    def conv(inputs, outputs, taps, dilation=1):
        padding = dilation * (taps - 1) // 2
        layer = nn.Conv1d(inputs, outputs, taps, dilation=dilation, padding=padding)
        return normalized(layer, 0, api)

    class Residuals(nn.Module):
        def __init__(self, channels, taps):
            super().__init__()
            self.convs1 = nn.ModuleList([conv(channels, channels, taps, d) for d in (1, 3)])
            self.convs2 = nn.ModuleList([conv(channels, channels, taps) for _ in range(2)])

        def forward(self, x):
            for first, second in zip(self.convs1, self.convs2, strict=True):
                x = x + second(leaky_relu(first(leaky_relu(x, 0.1)), 0.1))
            return x

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_pre = conv(5, 8, 7)
            ups = [nn.ConvTranspose1d(8, 4, 4, 2, 1), nn.ConvTranspose1d(4, 2, 8, 4, 2)]
            self.ups = nn.ModuleList([normalized(up, 0, api) for up in ups])
            self.resblocks = nn.ModuleList([Residuals(c, k) for c in (4, 2) for k in (3, 5)])
            self.conv_post = conv(2, 1, 7)

        def forward(self, x):
            x = self.conv_pre(x)
            for i, up in enumerate(self.ups):
                x = up(leaky_relu(x, 0.1))
                x = (self.resblocks[2 * i](x) + self.resblocks[2 * i + 1](x)) / 2
            return self.conv_post(leaky_relu(x)).tanh()

    return Generator()


def codec(api):
    """The decoder of a codec: every weight has as many inputs as outputs, so shapes tell nothing.

    Of its two transposed convolutions, one does not stretch its input.
    """
    import torch
    from torch import nn

    class Snake(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(0.5 + torch.rand(1, 4, 1))

        def forward(self, x):
            return x + torch.sin(self.alpha * x) ** 2 / self.alpha

    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.snake = Snake()
            self.up = normalized(nn.ConvTranspose1d(4, 4, 4, 2, 1), 0, api)
            self.smooth = normalized(nn.ConvTranspose1d(4, 4, 3, padding=1), 0, api)
            self.conv = normalized(nn.Conv1d(4, 4, 3, padding=1), 0, api)
            self.mix = normalized(nn.Conv1d(4, 4, 1), 0, api)

        def forward(self, x):
            x = self.smooth(self.up(self.snake(x)))
            return x + self.mix(self.conv(x).tanh())

    return Codec()


def attention(api):
    """Attention, whose query, key and value are one parameter; the last is normalized."""
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = normalized(nn.Linear(4, 4), 0, api)
            normalized(self.attend, 0, api, "in_proj_weight")

        def forward(self, x):
            x = x.mT
            return self.head(self.attend(x, x, x, need_weights=False)[0]).mT

    return Attention()


def sequence(api):
    """What is not normalized: a table, an LSTM, batch norm; with a recurrent weight that is."""
    import torch
    from torch import nn

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3)
            self.lstm = normalized(nn.LSTM(3, 4, batch_first=True), 0, api, "weight_hh_l0")
            self.norm = nn.BatchNorm1d(4)
            self.head = normalized(nn.Linear(4, 2), 0, api)

        def forward(self, x):
            x, _ = self.lstm(self.table(x))
            return self.head(self.norm(x[:, -1]))

    module = Sequence().eval()
    module.lstm.bias_hh_l0.requires_grad_(False)  # two would learn twice as fast as Flax's one
    with torch.no_grad():
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module


def example(case, api):
    """The module of a case and an input."""
    import torch

    torch.manual_seed(0)
    if case == "positional":
        return positional(api), torch.randn(2, 4, 7)
    if case == "generator":
        return generator(api), torch.randn(2, 5, 6)
    if case == "codec":
        return codec(api), torch.randn(2, 4, 5)
    if case == "attention":
        return attention(api), torch.randn(2, 4, 5)
    if case == "sequence":
        return sequence(api), torch.arange(10).reshape(2, 5) % 7
    name, args, kwargs, dim, shape = LAYERS[case]
    return normalized(getattr(torch.nn, name)(*args, **kwargs), dim, api), torch.randn(shape)


def run(case, api):
    """The record of a case: a dict of dicts of arrays."""
    import torch

    module, x = example(case, api)
    state = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    y = module(x)
    target = torch.randn_like(y)
    torch.mean((y - target) ** 2).backward()
    optimizer.step()
    stepped = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    call = {"x": x.numpy(), "y": y.detach().numpy(), "target": target.numpy()}
    return {"state": state, "stepped": stepped, "call": call}


def recorded(case, api):
    """The record of a case in the committed file."""
    record = {"state": {}, "stepped": {}, "call": {}}
    with np.load(FILE) as arrays:
        for key in arrays.files:
            of, by, kind, name = key.split("|")
            if (of, by) == (case, api):
                record[kind][name] = arrays[key]
    return record


if __name__ == "__main__":
    np.savez_compressed(
        FILE,
        **{
            f"{case}|{api}|{kind}|{name}": x
            for case in CASES
            for api in APIS
            for kind, arrays in run(case, api).items()
            for name, x in arrays.items()
        },
    )
