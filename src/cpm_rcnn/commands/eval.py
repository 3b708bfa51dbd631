"""Compute the COCO metrics of a checkpoint."""

import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cpm_rcnn.cli.assembly import evaluation_data, evaluation_keys, load_detector
from cpm_rcnn.cli.lightning import lightning_errors
from cpm_rcnn.cli.trainer import build_evaluator
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.evaluation.module import EvaluationModule
from cpm_rcnn.evaluation.records import record_evaluation
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.evaluation_report import report_evaluation
from cpm_rcnn.reporting.tables import print_metrics, write_metrics


def evaluate_checkpoint(config: DictConfig) -> None:
    """Run one evaluation; its results are written to Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    use_deform_backend(config.ops.deform)
    detector, data = load_detector(config)
    module = EvaluationModule(detector, operating_precision=config.operating_precision)
    datamodule = evaluation_data(config, detector, data)
    trainer = build_evaluator(config, run_dir)
    loop = trainer.validate if config.split == "val" else trainer.test
    with evaluation_keys(config), lightning_errors(config):
        loop(module, datamodule=datamodule, verbose=False)
    if not trainer.is_global_zero:
        return
    assert isinstance(module.metric, CocoMetric)
    write_metrics(module.metrics, run_dir / "metrics.json")
    if module.operating_points is not None:
        write_metrics(module.operating_points, run_dir / "operating_points.json")
    (run_dir / "detections.json").write_text(json.dumps(module.metric.results(config.details)))
    images = datamodule.images_folder("val" if config.split == "val" else "test")
    record_evaluation(module.metric, run_dir, images)
    model, settings = str(config.ckpt), detector.model.settings
    report_evaluation(module.metric, module.operating_points, model, settings, images, run_dir)
    print_metrics(module.metrics)
    print(run_dir)
