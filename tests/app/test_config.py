"""Every combination of config groups composes, and makes the parts that it names."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cpm_rcnn import assembly
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.training.schedule import Schedule
from cpm_rcnn.cli.instantiate import TARGETS, make

CONF = Path(__file__).parents[2] / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, name: str = "train"):
    with initialize_config_module("cpm_rcnn.conf", version_base="1.3"):
        # ``name`` holds the time of day, which only a running Hydra resolves.
        return compose(name, overrides=[*overrides, "name=test"])


def test_the_groups_offer_what_the_readme_promises():
    assert {"r18", "r50", "r101", "x101", "x101_dcn", "timm", "tiny"} <= set(options("backbone"))
    assert {"1x", "2x", "2x_ms", "quickstart"} <= set(options("schedule"))
    assert {"coco", "shapes", "custom"} <= set(options("data"))
    assert {"default", "cpu", "ddp"} <= set(options("trainer"))
    assert {"csv", "tensorboard", "wandb"} <= set(options("logger"))
    assert {"quickstart", "cpm_r50_2x", "cpm_r101_2x", "cpm_x101_dcn_2x"} <= set(options("experiment"))
    for module in ("cmm", "ism", "rsm", "fusion"):
        assert {"on", "off"} <= set(options(module))


@pytest.mark.parametrize("backbone", options("backbone"))
def test_every_mix_of_modules_builds_on_every_backbone(backbone):
    for cmm, ism, rsm, fusion in itertools.product(options("cmm"), options("ism"), options("rsm"), options("fusion")):
        config = composed(
            f"backbone={backbone}",
            "backbone.weights=null",
            f"cmm={cmm}",
            f"ism={ism}",
            f"rsm={rsm}",
            f"fusion={fusion}",
        )
        arguments = assembly.model_arguments(config)
        with torch.device("meta"):
            detector = build_detector(**arguments, num_classes=3)
        assert len(detector.head.stages) == len(config.cmm.stages) == {"on": 3, "off": 1, "two_stage": 2}[cmm]
        assert (detector.head.ism is not None) == (ism == "on")
        assert (detector.head.rsm is not None) == (rsm == "on")
        assert all((stage.fusion is not None) == (fusion == "on") for stage in detector.head.stages)


@pytest.mark.parametrize("schedule", options("schedule"))
@pytest.mark.parametrize("data", options("data"))
def test_every_schedule_with_every_data_makes_a_recipe_and_a_data_module(schedule, data):
    paths = [f"data.{key}=x" for key in ("train_json", "train_images", "val_json", "val_images")]
    config = composed(f"schedule={schedule}", f"data={data}", *(paths if data == "custom" else []))
    recipe = Schedule(**{key: assembly.plain(config.schedule)[key] for key in Schedule.__dataclass_fields__})
    assert recipe.max_steps > max(recipe.milestones)
    datamodule = instantiate(config.data, batch_size=2, max_steps=1, _convert_="all")
    assert datamodule.batch_size == 2


@pytest.mark.parametrize("trainer", [name for name in options("trainer") if name != "ddp"])
@pytest.mark.parametrize("logger", [name for name in options("logger") if name != "wandb"])
def test_every_trainer_with_every_logger_makes_a_trainer(trainer, logger, tmp_path):
    config = composed(f"trainer={trainer}", f"logger={logger}", "trainer.accelerator=cpu")
    built = assembly.build_trainer(config, tmp_path)
    assert built.max_steps == config.schedule.max_steps
    assert {type(each.logger).__name__ for each in built.loggers} >= {"CSVLogger"}


def test_ddp_makes_a_trainer_of_several_processes(tmp_path):
    config = composed("trainer=ddp")
    assert (config.trainer.devices, config.trainer.accelerator) == (8, "gpu")
    config = composed("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert assembly.build_trainer(config, tmp_path).world_size == 2


def test_wandb_composes():
    # Neither the package nor an account is at hand: composed, not made.
    assert composed("logger=wandb").logger.wandb._target_ == "pytorch_lightning.loggers.WandbLogger"


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_makes_its_parts(experiment, tmp_path):
    config = composed(f"experiment={experiment}", "backbone.weights=null")
    with torch.device("meta"):
        build_detector(**assembly.model_arguments(config), num_classes=80)
    assert assembly.recipe(config)["max_steps"] == config.schedule.max_steps
    instantiate(config.data, batch_size=config.schedule.images_per_device, max_steps=1, _convert_="all")
    assert assembly.build_trainer(composed(f"experiment={experiment}", "trainer.accelerator=cpu"), tmp_path).max_steps


def test_the_issue_s_commands_mean_what_they_say():
    config = composed("backbone=x101_dcn", "trainer.devices=8")
    assert (config.backbone.name, config.backbone.deformable_stages) == ("resnext101_64x4d", [3, 4, 5])
    assert config.detector.max_grid_rois == 32
    assert config.trainer.devices == 8
    assert config.schedule.max_steps == 180_000
    assert config.data._target_ == "cpm_rcnn.data.CocoDataModule"


@pytest.mark.parametrize("name", ["eval", "predict"])
@pytest.mark.parametrize("multi_scale", ["on", "off"])
def test_eval_and_predict_compose(name, multi_scale):
    overrides = ["ckpt=x.ckpt"] + (["source=x"] if name == "predict" else [f"multi_scale={multi_scale}"])
    assert composed(*overrides, name=name).ckpt == "x.ckpt"


def test_a_config_can_name_what_this_project_s_configs_name_and_nothing_else(tmp_path):
    named = {m for path in CONF.rglob("*.yaml") for m in re.findall(r"_target_: (\S+)", path.read_text())}
    assert named == set(TARGETS)
    for override in ("trainer._target_=os.system", "++trainer.plugins={_target_:os.system}"):
        with pytest.raises(UserError, match=r"_target_=.*os\.system"):
            assembly.build_trainer(composed(override), tmp_path)
    with pytest.raises(UserError, match=r"_target_=\[\]"):
        make(OmegaConf.create({"root": "x"}))
