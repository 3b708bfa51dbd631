"""A head of one's own: registered, trained, saved, loaded, resumed and evaluated without a change of the package."""

from dataclasses import dataclass

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import cpm_rcnn
from cpm_rcnn import settings as fields
from cpm_rcnn.data.shapes import CATEGORIES, CLASSES, write_shapes
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.evaluation.module import EvaluationModule
from cpm_rcnn.inference.load import overrides_of_load
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads import HEADS, RoIHead
from cpm_rcnn.models.heads.classification import Classifier, classification_loss, select_detections
from cpm_rcnn.models.heads.roi_sampling import sample_rois
from cpm_rcnn.models.structures import Detections
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.step_seed import StepSeed
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.resume import check_same_run, find_resume_point
from cpm_rcnn.weights.starting import read_starting_detector
from small_models import SMALL, is_plain, same_values, shapes_data, small_trainer


@dataclass(frozen=True)
class ProposalSettings(fields.Settings):
    width: int = fields.architecture(8, check=fields.integer())
    samples: int = fields.training(16, check=fields.integer())
    score_threshold: float = fields.inference(0.0, check=fields.number(0, 1))
    overlap: float = fields.inference(0.5, check=fields.number(0, 1))


class ProposalHead(RoIHead):
    """Classifies the proposals and keeps their boxes."""

    settings_class = ProposalSettings

    def __init__(self, settings, inputs):
        super().__init__()
        self.settings = settings
        self.convention = inputs.convention
        self.classifier = Classifier(inputs, settings.width)

    def detect(self, features, proposals):
        probabilities = torch.softmax(self.classifier(features, proposals).float(), dim=1)
        options = {"score_threshold": self.settings.score_threshold, "nms_iou": self.settings.overlap}
        rois, scores, labels, _ = select_detections(probabilities, proposals, **options)
        return Detections(rois.boxes, rois.images, scores, labels, rois.valid)

    def losses(self, features, proposals, ground_truth):
        candidates = proposals.cat(ground_truth.rois())
        sampled = sample_rois(candidates, ground_truth, self.convention, self.settings.samples)
        logits = self.classifier(features, sampled.rois)
        return {"loss_cls": classification_loss(logits, sampled.labels, sampled.rois.valid)}


TRUNK = {name: SMALL[name] for name in ("backbone", "fpn_channels", "convention", "proposals_test")}
STEPS = 4


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(HEADS, "proposals", ProposalHead)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 6, 3)
    return root


def make_module(data, categories=CATEGORIES, **options):
    torch.manual_seed(0)
    schedule = {"max_steps": STEPS, "milestones": [3], "warmup_steps": 2}
    model = {**TRUNK, "head": "proposals", **options}
    return DetectionModule(model, categories, schedule, data.evaluation_arguments)


def fit(root, folder, point=None):
    """Train, or resume from ``point``; a checkpoint is kept after steps 2 and 4."""
    data = shapes_data(root, max_steps=STEPS)
    module = make_module(data)
    if point is not None:
        check_same_run(point, module.model.settings, module.detector.categories)
        data.start_step = point.step
    trainer = small_trainer(
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=True,
        callbacks=[StepSeed(0), ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)],
        plugins=[AtomicCheckpointIO(point)],
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, data, ckpt_path=None if point is None else point.path, weights_only=True)
    return module, trainer


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEADS, "proposals", ProposalHead)
        module, trainer = fit(root, folder)
    return module, trainer, folder


def test_it_trains(trained):
    module, trainer, folder = trained
    assert trainer.global_step == STEPS
    assert set(module.losses) == {"loss_rpn_objectness", "loss_rpn_box", "loss_cls"}
    first, last = (torch.load(folder / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in (2, 4))
    name = "model.head.classifier.predictor.weight"
    assert not torch.equal(first[name], last[name])
    assert torch.equal(last[name], module.state_dict()[name])


def test_it_is_loaded_from_a_checkpoint_in_both_ways(trained, root):
    module, _, folder = trained
    path = folder / "step=4.ckpt"
    again = DetectionModule.load_from_checkpoint(path)
    assert isinstance(again.model.head, ProposalHead)
    assert again.model.head.settings == module.model.head.settings
    assert is_plain(dict(again.hparams))
    detector = cpm_rcnn.load(path)
    assert same_values(again.model.state_dict(), module.model.state_dict())
    assert same_values(detector.model.state_dict(), module.model.state_dict())
    image = next((root / "val").iterdir())
    (expected,), (found,) = module.detector.detect([image]), detector.detect([image])
    assert len(found) > 0
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_its_test_time_settings_are_overrides_of_load(trained):
    path = trained[2] / "step=4.ckpt"
    assert "overlap" in overrides_of_load()
    assert cpm_rcnn.load(path, overlap=0.25).model.head.settings.overlap == 0.25
    with pytest.raises(ArgumentError, match=r"^width=9: not a test-time setting; allowed: .*overlap"):
        cpm_rcnn.load(path, width=9)
    with pytest.raises(ArgumentError, match=r"^overlap=2: must be a number"):
        cpm_rcnn.load(path, overlap=2)
    with pytest.raises(UserError, match=r"nms_iou: the head proposals has no such option; it has .*overlap"):
        cpm_rcnn.load(path, nms_iou=0.3)


def test_a_resumed_run_ends_with_the_same_weights_and_optimizer_as_an_undisturbed_one(trained, root, tmp_path):
    module, trainer, folder = trained
    point = find_resume_point(str(folder / "step=2.ckpt"), tmp_path)
    assert point.step == 2
    resumed, resumed_trainer = fit(root, tmp_path / "resumed", point)
    assert resumed_trainer.global_step == STEPS
    assert same_values(resumed.state_dict(), module.state_dict())
    states = [one.optimizers[0].state_dict()["state"] for one in (resumed_trainer, trainer)]
    assert states[0].keys() == states[1].keys()
    assert all(same_values(states[0][key], states[1][key]) for key in states[0])


def test_it_is_evaluated(trained, root):
    module, _, folder = trained
    data = shapes_data(root)
    small_trainer().validate(module, data, verbose=False)
    evaluation = EvaluationModule(cpm_rcnn.load(folder / "step=4.ckpt"))
    small_trainer().validate(evaluation, shapes_data(root), verbose=False)
    assert 0 <= evaluation.metrics["AP"] <= 1
    assert evaluation.metrics == module.metrics
    assert len(evaluation.metric.results()) > 0


def test_it_starts_from_a_checkpoint_with_other_classes(trained, root):
    path = trained[2] / "step=4.ckpt"
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(reversed(CLASSES))]
    model = make_module(shapes_data(root), categories).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = read_starting_detector(path)
    rows = initialize(model, list(reversed(CLASSES)), start=start)
    assert [(row.part, row.taken) for row in rows][-1] == ("head.classifier", True)
    stored = cpm_rcnn.load(path).model.state_dict()
    order = [0, *range(len(CLASSES), 0, -1)]
    for name, value in model.state_dict().items():
        by_class = name.startswith("head.classifier.predictor.")
        assert torch.equal(value, stored[name][order] if by_class else stored[name]), name
        assert not torch.equal(value, before[name]) or not before[name].any() or "bn" in name, name
    wider = make_module(shapes_data(root), width=12).model
    assert not initialize(wider, CLASSES, start=start)[-1].taken


def test_nothing_remains_registered(monkeypatch):
    monkeypatch.delitem(HEADS, "proposals")
    assert "overlap" not in overrides_of_load()
    with pytest.raises(ArgumentError, match=r"^head=proposals: must be one of "):
        build_detector("tiny", 3, head="proposals")
