"""The documents have no command with an option, group, script, target or extra that does not exist."""

import pytest

from command_checks import problem, without_bodies
from documents import by_document, commands


@pytest.fixture(scope="module", autouse=True)
def _without_bodies(tmp_path_factory):
    with without_bodies(tmp_path_factory.mktemp("reader")):
        yield


@by_document
def test_the_commands_of_the_documents_are_accepted(document):
    wrong = [
        f"{document.name}:{command.line}: {command.text}: {reason}"
        for command in commands(document)
        if (reason := problem(command.text)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python -m cpm_rcnn.train experiment=nosuch", "there is no conf/experiment/nosuch.yaml"),
        ("python -m cpm_rcnn.train schedule.epoch=3", "schedule.epoch: unknown option"),
        ("python -m cpm_rcnn.train -m cmm=on,of", "there is no conf/cmm/of.yaml"),
        ("python -m cpm_rcnn.train detector.nms_iou=2", "must be a number"),
        ("python -m cpm_rcnn.train data=custom", "give the folder of the data"),
        ("python -m cpm_rcnn.train data=custom data.val_fractions=0.2 ...", "data.val_fractions: unknown option"),
        ("srun python -m cpm_rcnn.train trainer.precision=8", "precision=8: must be one of"),
        ("python -m cpm_rcnn.eval ckpt=PATH multi_scale=no_such", "there is no conf/multi_scale/no_such.yaml"),
        ("python -m cpm_rcnn.eval ckpt=PATH detector.nms_iou=x", "must be a number"),
        ("python -m cpm_rcnn.predict ckpt=PATH", "source: must be given"),
        ("python -m cpm_rcnn.export ckpt=PATH dst=a.onnx format=pt2", "the name must end in .pt2"),
        ("python -m cpm_rcnn.compare outputs/eval_a", "give two or more"),
        ("cpm-rcnn evaluate ckpt=PATH", "no such command"),
        ("python benchmarks/nms.py --largest", "unrecognized arguments"),
        ("python benchmarks/no_such.py", "no such file"),
        ("make trian", "the Makefile has"),
        ("pip install 'cpm-rcnn[timm,tensorflow]'", "no such extra"),
        ("pytest -m tpu", "no such marker"),
        (".ci/no-such", "no such file"),
        ("pyton -m cpm_rcnn.train", "an unknown program"),
    ],
)
def test_a_wrong_command_is_reported_with_the_reason(command, reason):
    assert reason in (problem(command) or "")
