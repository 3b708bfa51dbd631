"""Train a model, evaluate its best and its last checkpoint, write plots and tables."""

from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Timer

from cpm_rcnn.cli.assembly import build_datamodule, build_module, check_files
from cpm_rcnn.cli.automatic import resolve_automatic
from cpm_rcnn.cli.config import as_path, config_keys
from cpm_rcnn.cli.data_check import training_findings
from cpm_rcnn.cli.epochs import resolve_epochs
from cpm_rcnn.cli.lightning import lightning_errors
from cpm_rcnn.cli.nodes import provisional
from cpm_rcnn.cli.recipe import training_recipe
from cpm_rcnn.cli.run_folder import refuse_earlier_run, remove_checkpoints
from cpm_rcnn.cli.trainer import build_trainer, check_disk_space, checkpoint_size
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.curves import keep_metrics, plot_curves
from cpm_rcnn.reporting.data_check import print_training_findings
from cpm_rcnn.reporting.evaluation_report import report_evaluation
from cpm_rcnn.reporting.report.page import HTML
from cpm_rcnn.reporting.tables import percent, print_metrics, print_transfer, write_metrics
from cpm_rcnn.reporting.validation_sheet import SHEET, validation_sheet
from cpm_rcnn.training.final_evaluation import CheckpointEvaluation, evaluate_checkpoints
from cpm_rcnn.training.fit import fit
from cpm_rcnn.training.logged_results import log_results
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.imagenet import warn_of_new_recipe
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.resume import check_recipe, check_same_run, find_resume_point
from cpm_rcnn.weights.starting import read_starting_detector


def train_model(config: DictConfig) -> None:
    """Run one training; its results are written to Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    use_deform_backend(config.ops.deform)
    if config.resume in (None, False) and not config.overwrite:
        refuse_earlier_run(run_dir)
    resume_point = find_resume_point(as_path(config.resume), run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    # The annotations do not depend on the options that are chosen by them.
    datamodule = build_datamodule(provisional(config))
    config = resolve_automatic(config, datamodule)
    datamodule = build_datamodule(config, datamodule.splits)
    check_files(config, datamodule)
    config = resolve_epochs(config, datamodule)
    start = None
    if resume_point is not None:
        input_format = resume_point.settings.backbone.resolved_format
    elif config.init is not None:
        start = read_starting_detector(as_path(config.init))
        input_format = start.settings.backbone.resolved_format
    else:
        input_format = None
    module = build_module(config, datamodule, input_format)
    if resume_point is None:
        repeat = config.init_stages == "repeat"
        transferred = initialize(module.model, module.detector.class_names, start=start, repeat_stages=repeat)
    else:
        check_same_run(resume_point, module.model.settings, module.detector.categories)
        datamodule.start_step = resume_point.step * config.trainer.accumulate_grad_batches
    if config.trainer.compile != "off":
        module.model.compile_layers(config.trainer.compile)
    size = checkpoint_size(module, averaged=config.ema is not None)
    check_disk_space(run_dir, size)
    trainer = build_trainer(config, run_dir, resume_point, size)
    module.hparams["recipe"] = training_recipe(config, module, datamodule, trainer.world_size)
    if resume_point is not None:
        check_recipe(resume_point, module.hparams["recipe"], config.resume_changes)
        module.schedule_counts = True
    if trainer.is_global_zero:
        if start is not None:
            print_transfer(start, transferred)
        if resume_point is None and config.init is None and module.schedule.optimizer == "sgd":
            warn_of_new_recipe(module.model.settings.backbone)
        if resume_point is None:
            remove_checkpoints(run_dir)
        keep_metrics(run_dir, resuming=resume_point is not None)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
        print_training_findings(training_findings(config, datamodule, module.model.settings))
    with config_keys(config, "data"), lightning_errors(config):
        fit(trainer, module, datamodule, resume_point, run_dir)
    selected, evaluated = evaluate_checkpoints(trainer, module, datamodule, run_dir, config.select)
    if trainer.is_global_zero:
        _report(config, trainer, module, datamodule, run_dir, selected, evaluated)


def _report(
    config: DictConfig,
    trainer: pl.Trainer,
    module: DetectionModule,
    datamodule: CocoDataModule,
    run_dir: Path,
    selected: str,
    evaluated: dict[str, CheckpointEvaluation],
) -> None:
    """Write and print the results of the selected checkpoint."""
    chosen = evaluated[selected]
    timer = next(each for each in trainer.callbacks if isinstance(each, Timer))  # type: ignore[attr-defined]
    minutes = timer.time_elapsed() / 60
    each_checkpoint = {name: {"step": found.step, **found.metrics} for name, found in evaluated.items()}
    metrics = {**chosen.metrics, "selected": selected, **each_checkpoint, "minutes": minutes}
    write_metrics(metrics, run_dir / "metrics.json")
    if not config.trainer.fast_dev_run and (run_dir / "metrics.csv").exists():
        plot_curves(run_dir / "metrics.csv", run_dir)
    if config.sheet_images:
        # Lightning has moved the model back to the CPU.
        detector = module.detector.to(trainer.strategy.root_device)
        dataset = datamodule.val_dataloader().dataset
        validation_sheet(detector, dataset, run_dir / SHEET, config.sheet_images)
    model = f"{run_dir.name}, {selected} checkpoint (step {chosen.step})"
    settings, images = module.model.settings, datamodule.images_folder("val")
    report = report_evaluation(chosen.metric, chosen.operating_points, model, settings, images, run_dir)
    if report is not None:
        log_results(trainer.loggers, report, run_dir / SHEET, run_dir / HTML, chosen.step)
    print_metrics(chosen.metrics)
    each = (f"{name} (step {found.step}) {percent(found.metrics['AP'])}" for name, found in evaluated.items())
    print(f"AP: {', '.join(each)}; the table is of the {selected} checkpoint")
    print(run_dir)
