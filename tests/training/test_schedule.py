"""The learning rate at each step, and the parameter groups of the optimizer."""

import pytest
import torch
from torch import nn

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.training.optimizer import build_optimizer, parameter_groups
from cpm_rcnn.training.schedule import Schedule


def tiny_detector(**arguments):
    sizes = {"fpn_channels": 16, "mlp_channels": 16, "point_channels": 4, "grid_convs": 1}
    return build_detector("tiny", 3, **sizes | arguments)


def test_the_learning_rate_warms_up_linearly_and_drops_at_the_milestones():
    schedule = Schedule(max_steps=180_000, milestones=(120_000, 160_000))
    expected = {0: 0.1, 250: 0.55, 499: 0.9982, 500: 1, 119_999: 1, 120_000: 0.1, 159_999: 0.1, 160_000: 0.01}
    assert {step: schedule.rate_factor(step) for step in expected} == pytest.approx(expected)


def test_warm_up_can_be_off_and_can_overlap_a_milestone():
    assert Schedule(max_steps=10, milestones=(), warmup_steps=0).rate_factor(0) == 1
    schedule = Schedule(max_steps=10, milestones=(2,), warmup_steps=4, warmup_factor=0.0, gamma=0.5)
    assert [schedule.rate_factor(step) for step in range(5)] == pytest.approx([0, 0.25, 0.25, 0.375, 0.5])


@pytest.mark.parametrize(("images", "rate"), [(16, 0.02), (2, 0.0025), (32, 0.04)])
def test_the_learning_rate_scales_with_the_number_of_images_per_step(images, rate):
    optimizer = build_optimizer(Schedule(max_steps=1, milestones=()), tiny_detector(), images)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate, 2 * rate])


def test_every_parameter_is_in_exactly_one_group_of_its_kind():
    detector = tiny_detector(fusion=True)
    weights, norms, biases = parameter_groups(detector, lr=0.5, weight_decay=1e-4, bias_lr_factor=2.0)
    names = {parameter: name for name, parameter in detector.named_parameters()}
    grouped = [parameter for group in (weights, norms, biases) for parameter in group["params"]]
    assert len(grouped) == len(names)
    assert set(grouped) == set(names)
    assert all(names[parameter].endswith(".bias") for parameter in biases["params"])
    assert all(names[parameter].endswith(".weight") for parameter in weights["params"] + norms["params"])
    assert all(parameter.ndim == 1 for parameter in norms["params"])
    assert all(parameter.ndim > 1 for parameter in weights["params"])
    settings = [(group["lr"], group["weight_decay"]) for group in (weights, norms, biases)]
    assert settings == [(0.5, 1e-4), (0.5, 0.0), (1.0, 0.0)]


def test_frozen_parameters_are_in_no_group():
    detector = tiny_detector()
    detector.backbone.requires_grad_(False)
    groups = parameter_groups(detector, 0.1, 1e-4, 2.0)
    grouped = {parameter for group in groups for parameter in group["params"]}
    assert grouped == {parameter for parameter in detector.parameters() if parameter.requires_grad}
    assert not grouped & set(detector.backbone.parameters())


def test_layer_norms_have_no_weight_decay():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decays = {p: group["weight_decay"] for group in parameter_groups(net, 0.1, 1e-4, 2.0) for p in group["params"]}
    assert decays[net[1].weight] == 0
    assert decays[net[0].weight] == 1e-4


def test_groups_without_parameters_are_left_out():
    groups = parameter_groups(nn.Linear(2, 2, bias=False), 0.1, 1e-4, 2.0)
    assert [len(group["params"]) for group in groups] == [1]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_named_optimizer_is_used_and_changes_the_weights(name, kind):
    net = nn.Linear(2, 2)
    optimizer = build_optimizer(Schedule(max_steps=1, milestones=(), optimizer=name, momentum=0.8), net, 16)
    assert type(optimizer) is kind
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    before = net.weight.detach().clone()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 0),
        ("base_lr", -1.0),
        ("base_lr", float("nan")),
        ("gamma", 1.5),
        ("warmup_steps", -1),
        ("warmup_factor", 2.0),
        ("optimizer", "lion"),
        ("momentum", 1.1),
        ("weight_decay", -1e-4),
        ("bias_lr_factor", "two"),
        ("milestones", (5, 3)),
        ("milestones", (-1,)),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_its_argument(key, value):
    arguments = {"max_steps": 10, "milestones": (5,)} | {key: value}
    with pytest.raises(ArgumentError, match=rf"^{key}="):
        Schedule(**arguments)


def test_the_default_is_the_paper_s_2x_schedule():
    schedule = Schedule()
    assert (schedule.max_steps, tuple(schedule.milestones), schedule.base_lr) == (180_000, (120_000, 160_000), 0.02)
    assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (schedule.warmup_steps, schedule.images_per_device) == (500, 2)


def test_plain_values_give_the_same_schedule_again():
    schedule = Schedule(max_steps=7, milestones=[3], optimizer="adamw")
    again = Schedule.from_dict(schedule.to_dict())
    assert [again.rate_factor(step) for step in range(7)] == [schedule.rate_factor(step) for step in range(7)]
    assert again.to_dict() == schedule.to_dict()
    with pytest.raises(ArgumentError, match=r"^schedule: unknown key steps; allowed: epochs, max_steps"):
        Schedule.from_dict({"steps": 7}, "schedule")
