"""The checks of a data set with the model and the option names of a config."""

from collections.abc import Iterable
from dataclasses import replace

from omegaconf import DictConfig

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.cli.config import with_config_keys
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.data.doctor.anchors import Anchors
from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.examination import examine_annotations
from cpm_rcnn.data.doctor.finding import Finding
from cpm_rcnn.data.settings import Split
from cpm_rcnn.models.fpn import STRIDES
from cpm_rcnn.models.rpn import RATIOS, RPNSettings
from cpm_rcnn.models.settings import ModelSettings


def anchors_of(settings: RPNSettings, convention: str) -> Anchors:
    """The anchors of a model.

    Args:
        settings: the settings of its region proposal network.
        convention: name of its box coordinate convention.
    """
    sizes, ignore_border = settings.anchor_sizes, settings.ignore_border_anchors
    return Anchors(sizes, STRIDES, RATIOS, CONVENTIONS[convention], ignore_border)


def training_findings(config: DictConfig, datamodule: CocoDataModule, model: ModelSettings) -> list[Finding]:
    """The findings about the annotations of a run, which its data module has read; the most severe first.

    What is wrong with the annotation files themselves is not among them: the data module has reported it.
    """
    splits: tuple[Split, ...] = ("train", "val")
    checked = [CheckedSplit.of(name, datamodule.annotations(name), datamodule.settings) for name in splits]
    found = examine_annotations(checked, anchors_of(model.rpn, model.trunk.convention))
    return named_by_keys(config, found)


def named_by_keys(config: DictConfig, findings: Iterable[Finding]) -> list[Finding]:
    """Findings with config keys in place of the names of options."""

    def keys(text: str) -> str:
        return with_config_keys(config, "detector", with_config_keys(config, "data", text))

    return [
        replace(
            finding,
            sentence=keys(finding.sentence),
            advice=keys(finding.advice),
            override=keys(finding.override),
        )
        for finding in findings
    ]
