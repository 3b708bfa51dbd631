"""A small residual network with GroupNorm that can be trained from scratch on a CPU."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cpm_rcnn.models.init import init_conv

_NORM_GROUPS = 8


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_NORM_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_NORM_GROUPS, channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride)
        for conv in (self.conv1, self.conv2, self.shortcut):
            init_conv(conv)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class TinyBackbone(nn.Module):
    """A stem with stride 4 and four residual blocks at strides 4, 8, 16 and 32.

    Args:
        channels: channels of the four outputs, multiples of 8.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 4, stride=4, bias=False),
            nn.GroupNorm(_NORM_GROUPS, channels[0]),
            nn.ReLU(),
        )
        widths = [channels[0], *channels]
        self.blocks = nn.ModuleList(
            _Block(widths[i], widths[i + 1], stride=1 if i == 0 else 2) for i in range(len(channels))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        x = self.stem(images)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs
