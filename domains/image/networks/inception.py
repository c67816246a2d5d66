"""InceptionV3 as the Fréchet Inception Distance uses it, with weights from the user's own file.

The network of the 2015 TensorFlow release, whose average pooling leaves padding out and whose last
block pools by maximum; parameters have the names of torch-fidelity's
`pt_inception-2015-12-05-6726825d.pth`, so that this file loads. The weights do not ship.

References:
    Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016),
    https://arxiv.org/abs/1512.00567
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et
    al., 2017; FID), https://arxiv.org/abs/1706.08500
    High-fidelity performance metrics for generative models in PyTorch (Obukhov et al., 2020;
    torch-fidelity), https://doi.org/10.5281/zenodo.4957738
"""

import hashlib
import pickle
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["InceptionV3", "resize_like_tensorflow_1"]

_PUBLISHED = "6726825d"  # how the hash of the published file begins
_SIZE = 299
_NUM_CLASSES = 1008
_Kernel = int | tuple[int, int]


class InceptionV3(nn.Module):
    """The 2,048 features before the classifier; pictures are rounded to bytes and scaled to 299.

    Args:
        name: What the features are called in metrics.
    """

    num_features = 2048

    def __init__(self, name: str = "inception") -> None:
        super().__init__()
        self.name = name
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Mixed5(192, 32)
        self.Mixed_5c = _Mixed5(256, 64)
        self.Mixed_5d = _Mixed5(288, 64)
        self.Mixed_6a = _Mixed6a(288)
        self.Mixed_6b = _Mixed6(768, 128)
        self.Mixed_6c = _Mixed6(768, 160)
        self.Mixed_6d = _Mixed6(768, 160)
        self.Mixed_6e = _Mixed6(768, 192)
        self.Mixed_7a = _Mixed7a(768)
        self.Mixed_7b = _Mixed7(1280, pool="average")
        self.Mixed_7c = _Mixed7(2048, pool="maximum")
        self.fc = nn.Linear(2048, _NUM_CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures [B, 3, H, W] in [0, 1], [B, 2048]."""
        levels = (255 * pictures).round().clamp(0, 255)
        x = (resize_like_tensorflow_1(levels, _SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        x = self.Mixed_7c(self.Mixed_7b(x))
        return x.mean(dim=(2, 3))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of weights; the name of any but the published file carries its hash.

        Raises:
            ValueError: The file holds something else.
        """
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = digest.startswith(_PUBLISHED)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"no file of weights: {error}") from error
        if not isinstance(state, dict):
            raise ValueError("the file holds no state dict")
        network = cls("inception" if known else f"inception-{digest[:6]}")
        network.load_state_dict(state)
        return network.float()


def resize_like_tensorflow_1(images: Tensor, size: int) -> Tensor:
    """Return images [B, C, H, W] at size x size as TensorFlow 1 resizes bilinearly.

    Output pixel i lies at i H / size: corners are not aligned, half pixels are ignored, and nothing
    is smoothed. The bilinear filters of torch and Pillow differ from it.
    """
    down, across = (_weights(n, size).to(images) for n in images.shape[-2:])
    return down @ images @ across.T


def _weights(num_in: int, num_out: int) -> Tensor:
    """Return the matrix of linear interpolation, [num_out, num_in]."""
    place = torch.arange(num_out, dtype=torch.float32) * (num_in / num_out)
    low = place.floor().long().clamp(max=num_in - 1)
    high = (low + 1).clamp(max=num_in - 1)
    share = (place - low).unsqueeze(1)
    eye = torch.eye(num_in)
    return (1 - share) * eye[low] + share * eye[high]


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, padding: _Kernel = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _row(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, length: int) -> _Conv:
    return _Conv(inputs, outputs, (length, 1), padding=(length // 2, 0))


class _Mixed5(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class _Mixed6a(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, functional.max_pool2d(x, 3, stride=2)], dim=1)


class _Mixed6(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1 = _Conv(inputs, width, 1)
        self.branch7x7_2 = _row(width, width, 7)
        self.branch7x7_3 = _column(width, 192, 7)
        self.branch7x7dbl_1 = _Conv(inputs, width, 1)
        self.branch7x7dbl_2 = _column(width, width, 7)
        self.branch7x7dbl_3 = _row(width, width, 7)
        self.branch7x7dbl_4 = _column(width, width, 7)
        self.branch7x7dbl_5 = _row(width, 192, 7)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class _Mixed7a(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        pooled = functional.max_pool2d(x, 3, stride=2)
        return torch.cat([three, self.branch7x7x3_4(seven), pooled], dim=1)


class _Mixed7(nn.Module):
    def __init__(self, inputs: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        average = self.pool == "average"
        pooled = _average(x) if average else functional.max_pool2d(x, 3, stride=1, padding=1)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)
