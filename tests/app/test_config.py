"""Every combination of config groups composes and builds, and each node mirrors one settings dataclass."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cpm_rcnn import build_detector
from cpm_rcnn.cli.config import UNSET, config_key, to_dict
from cpm_rcnn.cli.instantiate import ALLOWED, instantiate_allowed
from cpm_rcnn.cli.nodes import provisional, schedule_settings
from cpm_rcnn.cli.trainer import build_trainer
from cpm_rcnn.cli.trainer_options import TrainerOptions
from cpm_rcnn.data import DataSettings
from cpm_rcnn.data.settings import ShapesSettings
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import MultiScaleSettings
from cpm_rcnn.inference.detector import SIZE_OPTIONS
from cpm_rcnn.models.backbones import BackboneSettings
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.models.heads.cpm import CMM_STAGES, TWO_STAGES
from cpm_rcnn.models.rpn import RPNSettings
from cpm_rcnn.models.settings import TrunkSettings, inference_options
from cpm_rcnn.training.schedule import Schedule
from cpm_rcnn.weights.imagenet import TIMM_FILES

CONF = Path(__file__).parents[2] / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, name: str = "train"):
    with initialize_config_module("cpm_rcnn.conf", version_base="1.3"):
        # ``name`` contains the time, which only a running Hydra resolves.
        return compose(name, overrides=[*overrides, *(["name=test"] if name not in ("convert", "export") else [])])


def model_of(config, num_classes: int = 3):
    """The model of a config, without memory for its weights."""
    with torch.device("meta"):
        return build_detector(to_dict(config.backbone), num_classes, **to_dict(config.detector))


def test_the_groups_offer_what_the_readme_promises():
    assert {"r18", "r50", "r101", "x101", "x101_dcn", "timm", "tiny"} <= set(options("backbone"))
    assert {"1x", "2x", "2x_ms", "quickstart"} <= set(options("schedule"))
    assert {"coco", "shapes", "custom"} <= set(options("data"))
    assert {"default", "cpu", "ddp"} <= set(options("trainer"))
    assert {"csv", "tensorboard", "wandb"} <= set(options("logger"))
    assert {"quickstart", "cpm_r50_2x", "cpm_r101_2x", "cpm_x101_dcn_2x"} <= set(options("experiment"))
    for module in ("cmm", "ism", "rsm", "fusion"):
        assert {"on", "off"} <= set(options(module))


def test_every_combination_of_modules_builds():
    for cmm, ism, rsm, fusion in itertools.product(options("cmm"), options("ism"), options("rsm"), options("fusion")):
        config = composed("backbone=tiny", f"cmm={cmm}", f"ism={ism}", f"rsm={rsm}", f"fusion={fusion}")
        head = model_of(config).head
        assert len(head.stages) == len(config.cmm.stages) == {"on": 3, "off": 1, "two_stage": 2, "first_two": 2}[cmm]
        assert (head.ism is not None) == (ism == "on")
        assert (head.rsm is not None) == (rsm == "on")
        assert all((stage.fusion is not None) == (fusion == "on") for stage in head.stages)


@pytest.mark.parametrize("backbone", options("backbone"))
@pytest.mark.parametrize("head", options("head"))
def test_every_head_builds_on_every_backbone(backbone, head):
    detector = model_of(composed(f"backbone={backbone}", "backbone.weights=null", f"head={head}"))
    assert detector.settings.trunk.head == head
    assert detector.settings.backbone == detector.settings.backbone.from_dict(detector.settings.backbone.to_dict())


@pytest.mark.parametrize("schedule", options("schedule"))
@pytest.mark.parametrize("data", options("data"))
def test_every_schedule_with_every_data_makes_a_schedule_and_a_data_module(schedule, data):
    paths = [f"data.{key}=x" for key in ("train_json", "train_images", "val_json", "val_images")]
    config = provisional(composed(f"schedule={schedule}", f"data={data}", *(paths if data == "custom" else [])))
    settings = schedule_settings(config)
    assert settings.max_steps > max(settings.milestones)
    datamodule = instantiate_allowed(config.data, batch_size=2, max_steps=1)
    assert datamodule.batch_size == 2


@pytest.mark.parametrize("trainer", [name for name in options("trainer") if name != "ddp"])
@pytest.mark.parametrize("logger", [name for name in options("logger") if name != "wandb"])
def test_every_trainer_with_every_logger_makes_a_trainer(trainer, logger, tmp_path):
    config = composed(f"trainer={trainer}", f"logger={logger}", "trainer.accelerator=cpu")
    built = build_trainer(config, tmp_path)
    assert built.max_steps == config.schedule.max_steps
    assert ("CSVLogger" in {type(each.logger).__name__ for each in built.loggers}) == (logger != "none")


def test_ddp_makes_a_trainer_with_several_processes(tmp_path):
    config = composed("trainer=ddp")
    assert (config.trainer.devices, config.trainer.accelerator) == (8, "gpu")
    config = composed("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert build_trainer(config, tmp_path).world_size == 2


def test_wandb_composes():
    # Only composed, because constructing it needs the package and an account.
    assert composed("logger=wandb").logger.wandb._target_ == "pytorch_lightning.loggers.WandbLogger"


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_makes_its_parts(experiment, tmp_path):
    paths = [f"data.{key}=x" for key in ("train_json", "train_images", "val_json", "val_images")]
    paths = paths if experiment == "finetune" else []
    config = provisional(composed(f"experiment={experiment}", "backbone.weights=null", *paths))
    model_of(config, num_classes=80)
    assert schedule_settings(config).max_steps == config.schedule.max_steps
    instantiate_allowed(config.data, batch_size=config.schedule.images_per_device, max_steps=1)
    assert build_trainer(composed(f"experiment={experiment}", "trainer.accelerator=cpu", *paths), tmp_path).max_steps


def test_backbone_x101_dcn_on_eight_devices_is_the_paper_s_model_and_schedule():
    config = composed("backbone=x101_dcn", "trainer.devices=8")
    assert (config.backbone.name, config.backbone.deformable_stages) == ("resnext101_64x4d", [3, 4, 5])
    assert config.detector.max_grid_rois == 32
    assert config.trainer.devices == 8
    assert config.schedule.max_steps == 180_000
    assert config.data._target_ == "cpm_rcnn.data.CocoDataModule"


@pytest.mark.parametrize("backbone", ["x101", "x101_dcn"])
def test_resnext_starts_from_weights_of_an_older_recipe_that_can_be_downloaded(backbone):
    assert composed(f"backbone={backbone}").backbone.weights == "resnext101_64x4d.gluon_in1k"
    assert "resnext101_64x4d.gluon_in1k" in TIMM_FILES


# Every training detail in which the authors' release differs: the release's value and this project's default.
RELEASE = {
    "detector.convention": ("inclusive", "continuous"),
    "detector.grid_init": ("pytorch", "grid_rcnn"),
    "detector.ism_weights": ("release", "equal"),
    "detector.loss_mean": ("process", "run"),
    "detector.proposals_train_per": ("batch", "image"),
    "data.resize_rounding": ("down", "nearest"),
    "data.min_box_size": (1, 0),
    "data.batch_orientation": ("process", "step"),
    "select": ("last", "best"),
}


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if name != "finetune"])
def test_the_release_experiments_and_no_others_have_the_training_details_of_the_release(experiment):
    overrides = ["cmm=two_stage", "data=shapes"] if experiment == "release_r50" else []  # groups can be combined
    config = composed(f"experiment={experiment}", "backbone.weights=x.pth", *overrides)
    column = 0 if experiment.startswith("release_") else 1
    assert {key: OmegaConf.select(config, key) for key in RELEASE} == {key: row[column] for key, row in RELEASE.items()}
    if column == 0:
        assert config.backbone.input_format == "caffe"
        assert config.schedule.max_steps == 180_000


@pytest.mark.parametrize(
    ("row", "groups"),
    [
        ("none", ("off", "off", "off")),
        ("two_stage", ("two_stage", "off", "off")),
        ("cmm", ("on", "off", "off")),
        ("cmm_two", ("first_two", "off", "off")),
        ("ism_one", ("off", "on", "off")),
        ("ism", ("two_stage", "on", "off")),
        ("rsm", ("two_stage", "off", "on")),
        ("ism_rsm", ("two_stage", "on", "on")),
    ],
)
def test_every_ablation_is_the_named_combination_of_groups(row, groups):
    config = composed(f"experiment=ablation_{row}")
    expected = composed(*(f"{group}={choice}" for group, choice in zip(("cmm", "ism", "rsm"), groups)))
    assert to_dict(config.detector) == to_dict(expected.detector)
    assert config.backbone == expected.backbone


@pytest.mark.parametrize("name", ["eval", "predict"])
@pytest.mark.parametrize("multi_scale", ["on", "off"])
def test_eval_and_predict_compose(name, multi_scale):
    overrides = ["ckpt=x.ckpt", f"multi_scale={multi_scale}", *(["source=x"] if name == "predict" else [])]
    assert composed(*overrides, name=name).ckpt == "x.ckpt"


def targets(content) -> set[str]:
    """All values of ``_target_`` in the content of a yaml file."""
    if isinstance(content, list):
        return {name for item in content for name in targets(item)}
    if not isinstance(content, dict):
        return set()
    own = {content["_target_"]} if "_target_" in content else set()
    return own | {name for item in content.values() for name in targets(item)}


def test_a_config_may_instantiate_only_the_classes_of_this_project_s_configs(tmp_path):
    named, by_hydra = set(), set()
    for path in CONF.rglob("*.yaml"):
        content = yaml.safe_load(path.read_text()) or {}
        by_hydra |= targets(content.pop("hydra", {}))
        named |= targets(content)
    assert named == set(ALLOWED)
    # Hydra itself instantiates what is in its own node: only one class of this project, and a base class of Hydra that
    # does nothing.
    assert by_hydra == {"cpm_rcnn.cli.sweep.SweepReport", "hydra.experimental.callback.Callback"}
    with pytest.raises(UserError, match=r"_target_=.*SweepReport"):
        build_trainer(composed("trainer._target_=cpm_rcnn.cli.sweep.SweepReport"), tmp_path)
    for override in ("trainer._target_=os.system", "++trainer.plugins={_target_:os.system}"):
        with pytest.raises(UserError, match=r"_target_=.*os\.system"):
            build_trainer(composed(override), tmp_path)
    with pytest.raises(UserError, match=r"_target_=\[\]"):
        instantiate_allowed(OmegaConf.create({"root": "x"}))


# --- the settings dataclasses and the config ---


def same_values(values, settings) -> bool:
    return values == {name: settings.to_dict()[name] for name in values}


def test_the_detector_node_mirrors_the_settings_of_trunk_rpn_and_head():
    for head, head_class in HEADS.items():
        config = composed(f"head={head}")
        values = to_dict(config.detector)
        owners = [TrunkSettings(head=head), RPNSettings(), head_class.settings_class()]
        names = [name for owner in owners for name in owner.names()]
        assert sorted(names) == sorted(values), "an option belongs to exactly one dataclass"
        for owner in owners:
            assert same_values({name: values[name] for name in owner.names()}, owner)


def test_the_other_nodes_mirror_their_dataclass():
    config = composed()
    schedule = to_dict(config.schedule)
    sizes = {key: schedule.pop(key) for key in ("short_sides", "max_size", "test_short_side", "test_max_size")}
    assert schedule == Schedule().to_dict()
    assert sizes == {key: DataSettings().to_dict()[key] for key in sizes}
    assert set(config.backbone) == set(BackboneSettings.names())
    # How the splits of a data set are found is fixed for COCO and the shapes.
    found = {"format", "val_fraction", "split_seed"}
    for name, names in (("coco", set(DataSettings.names()) - found), ("custom", set(DataSettings.names()))):
        data = to_dict(composed(f"data={name}").data)
        assert data.pop("_target_") == "cpm_rcnn.data.CocoDataModule"
        assert set(data) == names
    shapes = set(to_dict(composed("data=shapes").data)) - {"_target_"}
    paths = {f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("json", "images")}
    assert shapes == set(ShapesSettings.names()) - paths - found
    trainer = to_dict(config.trainer)
    assert trainer.pop("_target_") == "pytorch_lightning.Trainer"
    assert trainer == TrainerOptions().to_dict()
    multi_scale = to_dict(composed("ckpt=x", "multi_scale=on", name="eval").multi_scale)
    assert multi_scale.pop("enabled") is True
    assert multi_scale == MultiScaleSettings().to_dict()


def test_the_cascades_of_the_configs_are_those_of_the_code():
    for choice, stages in (
        ("on", CMM_STAGES),
        ("off", CMM_STAGES[:1]),
        ("first_two", CMM_STAGES[:2]),
        ("two_stage", TWO_STAGES),
    ):
        assert to_dict(composed(f"cmm={choice}").cmm)["stages"] == [stage.to_dict() for stage in stages]


# Heads with boxes and with grid points share no settings class, and each head's config describes its options.
@pytest.mark.parametrize(
    ("option", "declarations", "descriptions"),
    [
        ("on_error", 1, 1),
        ("proposals_train", 1, 1),
        ("mapping_ratio", 1, 0),
        ("grid_convs", 1, 1),
        ("coder_weights", 1, 0),
        ("nms_iou", 2, 3),
    ],
)
def test_an_option_is_declared_once_per_kind_of_head_and_described_once_per_config(option, declarations, descriptions):
    sources = Path(__file__).parents[2] / "src"
    declared = [p for p in sources.rglob("*.py") if re.search(rf"(?m)^    {option}: .* = \w+\(", p.read_text())]
    described = [p for p in CONF.rglob("*.yaml") if re.search(rf"(?m)^ *{option}: .*#", p.read_text())]
    assert len(declared) == declarations, declared
    assert len(described) == descriptions, described


def test_the_options_of_a_checkpoint_that_can_be_overridden_are_those_of_the_settings_and_unset():
    model = set(inference_options())
    assert {"score_threshold", "nms_iou", "proposals_test", "ism", "rsm"} <= model
    nodes = {
        "eval": {"detector": model, "data": set(DataSettings.names("inference"))},
        "predict": {"detector": model, "data": set(SIZE_OPTIONS)},
        "convert": {"detector": model | {"stages"}},
        "export": {"detector": model, "data": set(SIZE_OPTIONS)},
    }
    for name, expected in nodes.items():
        config = composed(name=name)
        assert {node: set(config[node]) for node in expected} == expected
        assert all(value == UNSET for node in expected for value in config[node].values())


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("nms_iou", "detector.nms_iou"),
        ("stages[1].loss_weight", "cmm.stages[1].loss_weight"),
        ("ism", "ism.enabled"),
        ("backbone.name", "backbone.name"),
        ("on_error", "data.on_error"),
    ],
)
def test_messages_name_the_config_key_of_an_argument(argument, key):
    assert config_key(composed(), "detector", argument) == key
    assert config_key(composed(), "data", "short_sides") == "schedule.short_sides"
