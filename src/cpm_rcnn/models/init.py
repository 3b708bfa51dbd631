"""Initialization of layers: FC layers as in docs/method.md section 8, the grid stages as in Grid R-CNN."""

from torch import nn


def init_linear(module: nn.Module) -> None:
    """Initialize all FC layers inside ``module``: kaiming-uniform with a = 1, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)


def init_predictor(layer: nn.Linear) -> None:
    """Initialize the last layer of a classifier: N(0, 0.01), bias 0."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


def init_regressor(layer: nn.Linear) -> None:
    """Initialize the last layer of a box regressor: N(0, 0.001), bias 0."""
    nn.init.normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)


def init_conv(layer: nn.Conv2d) -> None:
    """Initialize a convolution before a ReLU: kaiming-normal (fan out), bias 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_deconv(layer: nn.ConvTranspose2d, bias: float) -> None:
    """Initialize a transposed convolution of a grid stage: N(0, 0.001) and a constant bias."""
    nn.init.normal_(layer.weight, std=0.001)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
