"""The optimizer of a schedule and its parameter groups (docs/method.md section 8)."""

import torch
from torch import nn

from cpm_rcnn.training.schedule import Schedule

# Images per step for which ``base_lr`` is defined: 8 GPUs with 2 images each.
REFERENCE_BATCH = 16


def build_optimizer(schedule: Schedule, module: nn.Module, images_per_step: int) -> torch.optim.Optimizer:
    """The optimizer of the parameters of ``module`` that require a gradient.

    Args:
        schedule: the settings.
        module: the detector.
        images_per_step: images over all processes and accumulated batches; it scales the learning rate.
    """
    lr = schedule.base_lr * images_per_step / REFERENCE_BATCH
    groups = parameter_groups(module, lr, schedule.weight_decay, schedule.bias_lr_factor)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum)


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, bias_lr_factor: float) -> list[dict]:
    """The parameters that require a gradient, as three groups: weights, norm weights and biases.

    Only weights have weight decay, and biases have a learning rate of their own.
    """
    weights, norms, biases = [], [], []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
                norms.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": norms, "lr": lr, "weight_decay": 0.0},
        {"params": biases, "lr": lr * bias_lr_factor, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
