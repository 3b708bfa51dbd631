"""The heads of this project and torchvision's Faster R-CNN on photographs, with the same settings except for the head.

The last column but one is the rank correlation of the score with the true IoU of the detections that find an object:
after classification, after ISM and after RSM.

All have the same ImageNet backbone (a timm model, stem and BatchNorm frozen), feature pyramid, anchors, images, image
size, batches, steps, optimizer and schedule. They are trained one after the other in one run, and each keeps its own
test settings. The metrics are COCO's on the validation split.

    python benchmarks/real_images.py --root DATA --weights tf_efficientnet_lite0.safetensors

``DATA`` contains ``annotations/instances_{train,val}.json``, ``train/`` and ``val/``.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.evaluation.analysis.outcomes import find_outcomes
from cpm_rcnn.evaluation.analysis.score_ranking import score_ranking
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES, CocoMetric
from cpm_rcnn.inference import Detector
from cpm_rcnn.models.backbones import build_body
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.fpn import FPNBackbone
from cpm_rcnn.reporting.validation_sheet import validation_sheet
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.progress import LossProgressBar
from cpm_rcnn.weights.backbone import load_backbone
from cpm_rcnn.weights.checkpoints import write_checkpoint
from cpm_rcnn.weights.initialize import initialize

BACKBONE = "tf_efficientnet_lite0"
ANCHOR_SIZES = (16, 32, 64, 128, 256)
SAMPLES = 128
PROPOSALS_TRAIN, PROPOSALS_TEST = 1000, 500
MLP_CHANNELS = 512
# The model of torchvision, and the heads of this project with their options.
TORCHVISION = "torchvision_faster"
GRID = {"head": "cpm", "point_channels": 16, "grid_convs": 4, "max_grid_rois": 24}
ONE_STAGE = [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}]
HEADS: dict[str, dict[str, Any]] = {
    "faster": {"head": "faster"},
    "cascade": {"head": "cascade"},
    "cascade_ism_rsm": {"head": "cascade", "ism": True, "rsm": True},
    "cpm": GRID,
    # The ablation: without the three modules, and with one of them.
    "cpm_none": {**GRID, "stages": ONE_STAGE, "ism": False, "rsm": False},
    "cpm_cmm": {**GRID, "ism": False, "rsm": False},
    "cpm_ism": {**GRID, "stages": ONE_STAGE, "rsm": False},
    "cpm_rsm": {**GRID, "stages": ONE_STAGE, "ism": False},
    # The initialization of the release's grid stages, for comparison.
    "cpm_pytorch_init": {**GRID, "grid_init": "pytorch"},
}


class TorchvisionDetector(nn.Module):
    """torchvision's Faster R-CNN with the interface of ``TwoStageDetector``: uint8 images at network size."""

    def __init__(self, ours: TwoStageDetector, num_classes: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.settings = ours.settings
        fpn_channels = ours.settings.trunk.fpn_channels
        body = build_body(ours.settings.backbone)
        load_backbone(body, ours.settings.backbone, str(ours.settings.backbone.weights))
        names = ["p2", "p3", "p4", "p5"]
        self.net = FasterRCNN(
            FPNBackbone(body, fpn_channels),
            num_classes=None,
            rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in ANCHOR_SIZES), ((0.5, 1.0, 2.0),) * 5),
            box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
            box_head=TwoMLPHead(fpn_channels * 49, MLP_CHANNELS),
            box_predictor=FastRCNNPredictor(MLP_CHANNELS, num_classes + 1),
            rpn_pre_nms_top_n_train=PROPOSALS_TRAIN,
            rpn_post_nms_top_n_train=PROPOSALS_TRAIN,
            rpn_pre_nms_top_n_test=PROPOSALS_TEST,
            rpn_post_nms_top_n_test=PROPOSALS_TEST,
            box_batch_size_per_image=SAMPLES,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            min_size=sides[0],
            max_size=sides[1],
        )

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None, details: bool = False) -> Any:
        """Losses in train mode, detections in eval mode. It has no details."""
        ours = None if targets is None else [{key: t[key] for key in ("boxes", "labels")} for t in targets]
        return self.net([image.float() / 255 for image in images], ours)


def train(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and return its metrics."""
    pl.seed_everything(seed, verbose=False)
    data: dict[str, Any] = {
        "root": str(options.root),
        "train_json": "annotations/instances_train.json",
        "train_images": "train",
        "val_json": "annotations/instances_val.json",
        "val_images": "val",
        "batch_size": options.batch,
        "short_sides": [options.short_side],
        "max_size": 2 * options.short_side,
        "test_short_side": options.short_side,
        "test_max_size": 2 * options.short_side,
        "num_workers": 1,
        "seed": seed,
        "max_steps": options.steps,
    }
    datamodule = CocoDataModule(**data)
    backbone = {"name": BACKBONE, "weights": str(options.weights), "frozen_stages": 1}
    module = DetectionModule(
        model={
            "backbone": backbone,
            "fpn_channels": options.channels,
            "mlp_channels": MLP_CHANNELS,
            "anchor_sizes": ANCHOR_SIZES,
            "ignore_border_anchors": False,
            "proposals_train": PROPOSALS_TRAIN,
            "proposals_test": PROPOSALS_TEST,
            "samples": SAMPLES,
            **HEADS["faster" if kind == TORCHVISION else kind],
        },
        categories=datamodule.categories,
        schedule={
            "max_steps": options.steps,
            "milestones": [int(options.steps * 0.75), int(options.steps * 0.92)],
            "optimizer": options.optimizer,
            "base_lr": options.lr * 16 / options.batch,
            "warmup_steps": options.steps // 10,
            "weight_decay": options.weight_decay,
            "bias_lr_factor": 1.0 if options.optimizer == "adamw" else 2.0,
        },
        data=datamodule.evaluation_arguments,
    )
    if kind == TORCHVISION:
        short_side, max_size = sides = (options.short_side, 2 * options.short_side)
        peer: Any = TorchvisionDetector(module.model, len(datamodule.categories), sides)
        module.model = peer
        module.detector = Detector(peer, datamodule.categories, short_side=short_side, max_size=max_size)
    else:
        initialize(module.model)
    trainer = pl.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=1.0,
        val_check_interval=options.steps,
        callbacks=[LossProgressBar(log_every_n_steps=20)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=10.0,
        log_every_n_steps=20,
        accelerator=options.accelerator,
        devices=1,
    )
    begun = time.perf_counter()
    trainer.fit(module, datamodule=datamodule)
    seconds = time.perf_counter() - begun
    if kind != TORCHVISION:
        names = ("model", "categories", "schedule", "data")
        hyper_parameters = {name: module.hparams[name] for name in names}
        write_checkpoint(options.out / f"{kind}_seed{seed}.ckpt", module.model.state_dict(), hyper_parameters)
    dataset = datamodule.val_dataloader().dataset
    validation_sheet(module.detector, dataset, options.out / f"{kind}_seed{seed}.png", 6)
    return module.metrics | {"seconds": seconds, "rank_correlations": rank_correlations(module)}


def rank_correlations(module: DetectionModule) -> dict[str, float]:
    """The rank correlation of score and true IoU of detected objects after each step of the last evaluation."""
    assert isinstance(module.metric, CocoMetric)
    split = module.metric.evaluated_split()
    assert split is not None
    stages = score_ranking(split, find_outcomes(split.data))["stages"]
    return {stage["name"]: stage["rank_correlation"]["found"] for stage in stages}


def main() -> None:
    """Train all models on each seed; print the tables and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=[TORCHVISION, "faster", "cascade", "cascade_ism_rsm", "cpm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--short-side", type=int, default=240)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/real_images"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")

    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.models}
    for seed in options.seeds:
        for kind in options.models:
            results[kind].append(train(kind, seed, options))
            print(
                kind,
                "seed",
                seed,
                {k: round(v, 4) for k, v in results[kind][-1].items() if k not in ("per_class", "rank_correlations")},
                flush=True,
            )
            (options.out / "results.json").write_text(json.dumps(results, indent=1))

    table = Table(title=f"{options.root.name}: mean of seeds {options.seeds}, percent")
    table.add_column("model")
    for name in METRIC_NAMES:
        table.add_column(name, justify="right")
    table.add_column("rank correlation", justify="right")
    table.add_column("minutes", justify="right")
    for kind, runs in results.items():
        means = [sum(run[name] for run in runs) / len(runs) for name in METRIC_NAMES]
        minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
        ranks = [
            sum(run["rank_correlations"][step] for run in runs) / len(runs) for step in runs[0]["rank_correlations"]
        ]
        shown = " > ".join(f"{rank:.2f}" for rank in ranks)
        table.add_row(kind, *(f"{100 * mean:.1f}" for mean in means), shown, f"{minutes:.1f}")
    Console(width=150).print(table)
    print(options.out.absolute())


if __name__ == "__main__":
    main()
