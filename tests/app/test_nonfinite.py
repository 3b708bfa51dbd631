"""A loss that is no number: named, its batch kept, and the run stopped or passed over."""

import pytest
import torch
from small_run import SMALL
from test_commands import refused

from cpm_rcnn.models.detector import CPMRCNN

RUN = [*SMALL, "schedule.max_steps=3", "schedule.val_interval=3", "sheet_images=0", "schedule.warmup_steps=0"]


@pytest.fixture
def spoil(monkeypatch):
    """Make a loss of one step of training infinite or no number."""
    forward = CPMRCNN.forward

    def at(step, name, value):
        done = []

        def spoilt(self, images, targets=None):
            losses = forward(self, images, targets)
            if self.training:
                done.append(len(images))
                if len(done) == step + 1:
                    losses[name] = losses[name] * value
            return losses

        monkeypatch.setattr(CPMRCNN, "forward", spoilt)

    return at


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_loss_the_step_and_the_images_are_named_and_the_batch_is_kept(command, spoil, workplace, value):
    spoil(1, "loss_grid1", value)
    name = f"nonfinite_{value}"
    line = refused(command("train", *RUN, f"name={name}"))
    assert "step 1 (batch 1): loss_grid1=" in line
    file = workplace / f"outputs/{name}/nonfinite_batch1_rank0.pt"
    assert file.name in line
    kept = torch.load(file, weights_only=True)
    assert len(kept["images"]) == len(kept["targets"]) == 2
    assert all(image.dtype == torch.uint8 for image in kept["images"])
    assert str([target["image_id"] for target in kept["targets"]]) in line
    assert [loss for loss, v in kept["losses"].items() if not v.isfinite()] == ["loss_grid1"]


def test_a_step_that_is_passed_over_changes_no_weight(command, spoil):
    spoil(0, "loss_cls", float("nan"))
    # Only the spoilt step has a rate: whatever moves, moves there.
    answer = command("train", *RUN, "on_nonfinite=skip", "schedule.max_steps=1", "name=skipped")
    assert answer.status == 0, answer.err
    assert "loss_cls=nan" in answer.out + answer.err
    assert "passed over" in answer.out + answer.err
    skipped = torch.load(answer.folder / "checkpoints/last.ckpt", weights_only=True)
    still = command("train", *RUN, "schedule.base_lr=0", "schedule.max_steps=1", "name=still")
    untrained = torch.load(still.folder / "checkpoints/last.ckpt", weights_only=True)
    assert all(torch.equal(skipped["state_dict"][k], v) for k, v in untrained["state_dict"].items())
    assert (answer.folder / "nonfinite_batch0_rank0.pt").is_file()


def test_training_goes_on_after_a_step_that_was_passed_over(command, spoil):
    spoil(1, "loss_ism", float("inf"))
    answer = command("train", *RUN, "on_nonfinite=skip", "name=went_on")
    assert answer.status == 0, answer.err
    weights = torch.load(answer.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_only_two_things_can_be_done(command):
    assert "on_nonfinite=ignore: must be one of raise, skip" in refused(command("train", *RUN, "on_nonfinite=ignore"))
