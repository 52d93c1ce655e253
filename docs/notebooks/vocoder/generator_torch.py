"""A vocoder's generator in PyTorch, in the manner of HiFi-GAN, and the file that it leaves.

Run `python docs/notebooks/vocoder/generator_torch.py` to renew `generator.safetensors`: the state
dict of a generator of 39,000 parameters, and an input and its output by PyTorch. It was made
with torch 2.13.0 on a CPU. The weights are random, their lengths not those of v.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

FILE = Path(__file__).with_name("generator.safetensors")


def conv(inputs, outputs, taps, dilation=1):
    padding = dilation * (taps - 1) // 2
    return weight_norm(nn.Conv1d(inputs, outputs, taps, dilation=dilation, padding=padding))


class Residuals(nn.Module):
    def __init__(self, channels, taps):
        super().__init__()
        self.convs1 = nn.ModuleList([conv(channels, channels, taps, d) for d in (1, 3, 5)])
        self.convs2 = nn.ModuleList([conv(channels, channels, taps) for _ in range(3)])

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(leaky_relu(first(leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    """From a mel spectrogram, (batch, 40, frames), to a waveform, (batch, 1, 64 · frames)."""

    def __init__(self):
        super().__init__()
        self.conv_pre = conv(40, 32, 7)
        self.ups = nn.ModuleList(
            [
                weight_norm(nn.ConvTranspose1d(32, 16, 16, stride=8, padding=4)),
                weight_norm(nn.ConvTranspose1d(16, 8, 16, stride=8, padding=4)),
            ]
        )
        self.resblocks = nn.ModuleList([Residuals(c, taps) for c in (16, 8) for taps in (3, 7)])
        self.conv_post = conv(8, 1, 7)

    def forward(self, x):
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(leaky_relu(x, 0.1))
            x = (self.resblocks[2 * i](x) + self.resblocks[2 * i + 1](x)) / 2
        return self.conv_post(leaky_relu(x)).tanh()


def main():
    torch.manual_seed(0)
    generator = Generator().eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(1.2 + 0.4 * torch.rand_like(parameter))
        mel = torch.randn(1, 40, 16)
        waveform = generator(mel)
    state = {f"generator.{name}": x.contiguous() for name, x in generator.state_dict().items()}
    print(sum(x.numel() for x in state.values()), "parameters")
    save_file(state | {"example.mel": mel, "example.waveform": waveform}, FILE)


if __name__ == "__main__":
    main()
