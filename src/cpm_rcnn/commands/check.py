"""Check the annotations and images of a data set."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cpm_rcnn.cli.automatic import resolve_automatic
from cpm_rcnn.cli.config import config_keys, to_dict
from cpm_rcnn.cli.data_check import anchors_of, named_by_keys
from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.cli.nodes import data_with_paths, provisional
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.data.doctor.examination import examine
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.rpn import RPNSettings
from cpm_rcnn.reporting.data_check import print_examination, write_examination


def check_data(config: DictConfig) -> None:
    """Check a data set; the results are written to Hydra's output folder. The exit status is 1 if there are faults."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    fixed = provisional(config)
    detector = to_dict(fixed.detector)
    with config_keys(config, "detector"):
        rpn = RPNSettings.from_dict({name: detector[name] for name in RPNSettings.names()})
    with config_keys(config, "data"):
        datamodule = _datamodule(fixed)
    config = _resolved(config, datamodule)
    with config_keys(config, "data"):
        settings = _datamodule(config).settings
        anchors = anchors_of(rpn, config.detector.convention)
        examination = examine(datamodule.splits, settings, anchors, progress=True)
    examination = replace(examination, findings=named_by_keys(config, examination.findings))

    def open_image(split: Split, file_name: str) -> np.ndarray:
        # A file that ends early is one of the findings.
        image = datamodule.splits.images(split).read(file_name, warn=lambda message: None)
        return image.permute(1, 2, 0).numpy()

    write_examination(examination, run_dir, open_image)
    print_examination(examination)
    print(run_dir)
    if any(finding.severity == "fault" for finding in examination.findings):
        sys.exit(1)


def _datamodule(config: DictConfig) -> CocoDataModule:
    datamodule: CocoDataModule = instantiate_allowed(
        data_with_paths(config.data), "cpm_rcnn.data.", convention=config.detector.convention
    )
    datamodule.prepare_data()
    return datamodule


def _resolved(config: DictConfig, datamodule: CocoDataModule) -> DictConfig:
    """The config with the values that a training would choose; without objects there is nothing to choose by."""
    tolerant = copy.copy(datamodule)
    tolerant.splits = datamodule.splits.tolerant()
    try:
        empty = not tolerant.training_annotations.usable.any()
    except UserError:
        # The examination says what is wrong with the annotations.
        empty = True
    return provisional(config) if empty else resolve_automatic(config, tolerant)
