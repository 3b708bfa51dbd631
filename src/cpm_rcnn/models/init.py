"""Initial weights of spec section 8."""

from torch import nn


def init_linear(module: nn.Module) -> None:
    """FC layers inside ``module``: kaiming-uniform with a = 1, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
