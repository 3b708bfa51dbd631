"""Options that are ``auto`` in a config become values that fit the data and the devices of the training."""

from collections.abc import Sequence

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.assembly import build_module
from cpm_rcnn.cli.choices import Choice, Facts, choose
from cpm_rcnn.cli.config import config_keys, to_dict
from cpm_rcnn.cli.lightning import process_count, uses_gpu
from cpm_rcnn.cli.nodes import AUTO, PROVISIONAL, provisional, with_values
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.activation_memory import StepMemory, estimate_step_memory
from cpm_rcnn.models.backbones.settings import BackboneSettings


def resolve_automatic(config: DictConfig, datamodule: CocoDataModule) -> DictConfig:
    """The config with a value for each option that is ``auto``, which are printed; itself if there is none.

    Args:
        config: of ``train`` or ``check``.
        datamodule: knows the training annotations.

    Raises:
        UserError: no image has an object to train on, an option is invalid, or there are no such devices.
    """
    values = {key: OmegaConf.select(config, key) for key in PROVISIONAL}
    if AUTO not in values.values():
        return config
    with config_keys(config, "data"):
        annotations = datamodule.training_annotations
    if not annotations.usable.any():
        raise UserError(f"{annotations.path}: no image has an object to train on")
    facts = Facts.of(
        annotations,
        devices=process_count(config),
        gpu=uses_gpu(config),
        accumulated=config.trainer.accumulate_grad_batches,
        memory=_memory(config, datamodule) if values["schedule.images_per_device"] == AUTO else None,
        optimizer=config.schedule.optimizer,
        freezable=_freezable(config),
    )
    choices = list(choose(facts, values))
    _print(facts, choices, "images" if datamodule.settings.tile is None else "tiles")
    return with_values(config, {choice.key: choice.value for choice in choices})


def _freezable(config: DictConfig) -> int:
    """See :class:`~cpm_rcnn.cli.choices.Facts`."""
    if config.backbone.name == "tiny" or (config.backbone.weights is None and config.init is None):
        return 0
    with config_keys(config, "backbone"):
        return 2 if BackboneSettings.from_dict(to_dict(provisional(config).backbone)).is_resnet else 1


def _memory(config: DictConfig, datamodule: CocoDataModule) -> tuple[int, StepMemory] | None:
    """See :class:`~cpm_rcnn.cli.choices.Facts`."""
    if not uses_gpu(config) or not torch.cuda.is_available():
        return None
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=[]):
        return memory, estimate_step_memory(build_module(provisional(config), datamodule).model)


@rank_zero_only
def _print(facts: Facts, choices: Sequence[Choice], units: str) -> None:
    kind = ("GPU" if facts.gpu else "CPU") if facts.devices == 1 else ("GPUs" if facts.gpu else "CPU processes")
    print(f"chosen for {facts.images} training {units} and {facts.devices} {kind}:")
    width = max(len(f"{choice.key}={choice.value}") for choice in choices)
    for choice in choices:
        setting = f"{choice.key}={choice.value}"
        print(f"  {setting:{width}}  {choice.reason}")
