"""Non-finite losses: they are reported, their batch is saved, and the run stops or skips the step."""

import pytest
import torch
from runs import last_checkpoint, refused
from small_run import SMALL

from cpm_rcnn.models.detector import TwoStageDetector

RUN = [*SMALL, "schedule.max_steps=3", "schedule.val_interval=3", "sheet_images=0", "schedule.warmup_steps=0"]


@pytest.fixture
def spoil(monkeypatch):
    """Make a loss of one training step infinite or NaN."""
    forward = TwoStageDetector.forward

    def at(step, name, value):
        done = []

        def modified(self, images, targets=None, **options):
            losses = forward(self, images, targets, **options)
            if self.training:
                done.append(len(images))
                if len(done) == step + 1:
                    losses[name] = losses[name] * value
            return losses

        monkeypatch.setattr(TwoStageDetector, "forward", modified)

    return at


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_message_names_loss_step_and_images_and_the_batch_is_saved(command, spoil, workplace, value):
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


def test_a_skipped_step_changes_no_weight(command, spoil):
    spoil(0, "loss_cls", float("nan"))
    # The run has only this step, so any change of a weight would come from it.
    answer = command("train", *RUN, "on_nonfinite=skip", "schedule.max_steps=1", "name=skipped")
    assert answer.status == 0, answer.err
    assert "loss_cls=nan" in answer.out + answer.err
    assert "step skipped" in answer.out + answer.err
    skipped = last_checkpoint(answer.folder)
    still = command("train", *RUN, "schedule.base_lr=0", "schedule.max_steps=1", "name=still")
    untrained = last_checkpoint(still.folder)
    assert all(torch.equal(skipped["state_dict"][k], v) for k, v in untrained["state_dict"].items())
    assert (answer.folder / "nonfinite_batch0_rank0.pt").is_file()


@pytest.mark.parametrize("batch", [0, 1])
def test_a_step_of_accumulated_gradients_is_skipped_as_a_whole(command, spoil, batch):
    options = ["schedule.max_steps=1", "trainer.accumulate_grad_batches=2"]
    spoil(batch, "loss_cls", float("nan"))
    skipped = command("train", *RUN, *options, "on_nonfinite=skip", f"name=skipped_batch_{batch}")
    still = command("train", *RUN, *options, "schedule.base_lr=0", f"name=still_batch_{batch}")
    assert [skipped.status, still.status] == [0, 0], skipped.err
    weights = [last_checkpoint(answer.folder)["state_dict"] for answer in (skipped, still)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_training_continues_after_a_skipped_step(command, spoil):
    spoil(1, "loss_ism", float("inf"))
    answer = command("train", *RUN, "on_nonfinite=skip", "name=went_on")
    assert answer.status == 0, answer.err
    weights = last_checkpoint(answer.folder)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_another_action_is_refused(command):
    assert "on_nonfinite=ignore: must be one of raise, skip" in refused(command("train", *RUN, "on_nonfinite=ignore"))
