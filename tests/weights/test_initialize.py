"""Starting weights from a checkpoint."""

import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.weights.initialize import initialize
from small_models import same_values, small_module, write_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_trained(path).model.state_dict()


def test_without_init_and_without_pretrained_weights_nothing_changes():
    model = small_module().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model)
    assert same_values(model.state_dict(), before)


def test_all_weights_are_loaded_if_the_classes_have_the_same_names(trained):
    path, expected = trained
    model = small_module().model
    assert not same_values(model.state_dict(), expected)
    initialize(model, ["cat", "dog"], init=path)
    assert same_values(model.state_dict(), expected)


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "cow"], ["cat"], ["horse", "sheep"]])
def test_other_class_names_reinitialize_exactly_the_classification_layers(trained, names, caplog):
    path, expected = trained
    model = small_module(categories=[{"id": k + 1, "name": name} for k, name in enumerate(names)]).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model, names, init=path)
    after = model.state_dict()
    layers = {f"head.{part}.predictor.{kind}" for part in ("classifier", "rsm") for kind in ("weight", "bias")}
    assert all(torch.equal(after[name], before[name]) for name in layers)
    assert all(torch.equal(after[name], expected[name]) for name in after if name not in layers)
    (message,) = caplog.messages
    assert all(name in message for name in layers)
    assert "ism" not in message


def test_another_architecture_is_refused_with_both_values(trained):
    path, _ = trained
    for options, difference in [
        ({"mlp_channels": 24}, "mlp_channels is 16 in the checkpoint and 24 in this model"),
        ({"convention": "inclusive"}, "convention is continuous in the checkpoint and inclusive in this model"),
        ({"ism": False}, "ism is true in the checkpoint and false in this model"),
        ({"backbone": {"name": "resnet18"}}, "backbone.name is tiny in the checkpoint and resnet18 in this model"),
        (
            {"anchor_sizes": [16, 32, 64, 128, 256]},
            "anchor_sizes is [32, 64, 128, 256, 512] in the checkpoint and [16, 32, 64",
        ),
    ]:
        model = small_module(**options).model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UserError, match=r"^init=.*last\.ckpt: is a checkpoint of another model; ") as caught:
            initialize(model, ["cat", "dog"], init=path)
        assert difference in str(caught.value)
        assert same_values(model.state_dict(), before)


def test_all_differences_are_listed_together(trained):
    path, _ = trained
    with pytest.raises(
        UserError,
        match="mlp_channels is 16 in the checkpoint and 24 in this model; rsm is true in the checkpoint and false in",
    ):
        initialize(small_module(mlp_channels=24, rsm=False).model, ["cat", "dog"], init=path)


def test_other_settings_of_training_and_testing_are_accepted(trained):
    path, expected = trained
    stages = [{"positive_iou": 0.4, "mapping_ratio": ratio, "loss_weight": 2.0} for ratio in (1.0, 0.5, 0.25)]
    options = {"samples": 64, "max_grid_rois": 8, "proposals_train": 100, "ignore_border_anchors": False}
    options |= {"score_threshold": 0.5, "nms_iou": 0.6, "test_stages": 2, "proposals_test": 7, "stages": stages}
    model = small_module(**options).model
    initialize(model, ["cat", "dog"], init=path)
    assert same_values(model.state_dict(), expected)


def test_a_mapping_ratio_belongs_to_the_architecture(trained):
    path, _ = trained
    stages = [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}] * 3
    with pytest.raises(UserError, match=r"stages\.1\.mapping_ratio is 0\.5 in the checkpoint and 1\.0 in this model"):
        initialize(small_module(stages=stages).model, ["cat", "dog"], init=path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"^init=.*none\.ckpt: no such file"):
        initialize(small_module().model, ["cat", "dog"], init=tmp_path / "none.ckpt")
