"""Several processes give the results of one: gradients, losses, metrics, stops and faults."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import Hang, NotANumber, OlderBest, Signal, call, free_port, no_fault, slurm, together
from runs import last_checkpoint, same, same_run
from small_run import SMALL
from torch.nn.parallel import DistributedDataParallel

from cpm_rcnn.models import sampling
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads import refinement

CPM = {"head": "cpm", "point_channels": 8, "grid_convs": 1, "max_grid_rois": 6}
FUSED = {**CPM, "fusion": True}
FASTER = {"head": "faster", "ism": True, "rsm": True}
CASCADE = {"head": "cascade", "ism": True, "rsm": True}
LOSSES = {
    "cpm": ["cls", "grid0", "grid1", "grid2", "ism", "rsm"],
    "faster": ["cls0", "box0", "ism", "rsm"],
    "cascade": ["cls0", "box0", "cls1", "box1", "cls2", "box2", "ism", "rsm"],
}


# --- gradients ---


def detector(head):
    """A small detector; ``head`` are the options of its head. Heatmaps have clear maxima.

    Freshly initialized heatmaps are almost flat, so that rounding would decide which cell is highest.
    """
    torch.manual_seed(0)
    model = build_detector(
        "tiny",
        num_classes=5,
        fpn_channels=16,
        mlp_channels=16,
        anchor_sizes=(16, 32, 64, 128, 256),
        ignore_border_anchors=False,
        proposals_train=100,
        samples=32,
        **head,
    ).train()
    if head["head"] == "cpm":
        for stage in model.head.stages:
            torch.nn.init.normal_(stage.deconvs[-1].weight, std=0.3)
    else:
        # Freshly initialized regressors hardly move a box, and the losses of objects themselves are almost 0.
        for stage in model.head.stages:
            torch.nn.init.normal_(stage.regressor.weight, std=0.05)
    return model


def sample(number):
    """A 128 x 128 image with objects. All have the same size, so that no batch is padded."""
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(number + 2, 2, generator=generator) * 60
    size = torch.rand(number + 2, 2, generator=generator) * 40 + 20
    image = torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)
    boxes = torch.cat([corner, corner + size], 1)
    labels = torch.randint(1, 6, (number + 2,), generator=generator)
    return image.repeat_interleave(8, 1).repeat_interleave(8, 2), {"boxes": boxes, "labels": labels}


def empty(number):
    """The same image without objects."""
    return sample(number)[0], {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def step(model, samples):
    """Losses and gradients of one step on ``samples``, by name; a missing gradient is None."""
    # Sampling must not depend on the process: take the first RoIs of each image instead of random ones.
    by_key = sampling.rank_in_group
    sampling.rank_in_group = lambda key, group, groups: by_key(torch.zeros_like(key), group, groups)
    try:
        model.zero_grad()
        losses = model(*map(list, zip(*samples)))
        torch.stack(list(losses.values())).sum().backward()
    finally:
        sampling.rank_in_group = by_key
    module = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def hide_from_last_stage(model, images):
    """Let no RoI of ``images`` reach the last stage; ground-truth boxes always would.

    The match of the last stage's candidates is changed, so that none of them is positive.
    """
    head, calls, original = model.head, [], refinement.next_stage_rois
    losses = head.losses

    def next_stage_rois(*arguments):
        rois, match = original(*arguments)
        calls.append(rois)
        if len(calls) % (len(head.stages) - 1):
            return rois, match
        return rois, replace(match, iou=match.iou.masked_fill(torch.isin(rois.images, torch.tensor(images)), -1.0))

    def losses_without(*arguments):
        refinement.next_stage_rois = next_stage_rois
        try:
            return losses(*arguments)
        finally:
            refinement.next_stage_rois = original

    head.losses = losses_without


# For each case: the options of the head, the sample of each process, and the processes whose last stage gets no RoI.
CASES = {
    "objects everywhere": (CPM, [sample(0), sample(1), sample(2)], []),
    "objects everywhere, fused": (FUSED, [sample(0), sample(1), sample(2)], []),
    "none on the second": (FUSED, [sample(0), empty(1), sample(2)], []),
    "on the first only": (CPM, [sample(0), empty(1), empty(2)], []),
    "nowhere": (CPM, [empty(0), empty(1), empty(2)], []),
    "no positive on the second": (CPM, [sample(0), sample(1), sample(2)], [1]),
    "faster": (FASTER, [sample(0), sample(1), sample(2)], []),
    "faster, none on the second": (FASTER, [sample(0), empty(1), sample(2)], []),
    "cascade": (CASCADE, [sample(0), sample(1), sample(2)], []),
    "cascade, none on the second": (CASCADE, [sample(0), empty(1), sample(2)], []),
}


def an_image_each(rank, world):
    """Losses and gradients of this process, in each case."""
    dist.init_process_group("gloo")
    answers = {}
    for name, (head, samples, blind) in CASES.items():
        model = detector(head)
        if rank in blind:
            hide_from_last_stage(model, [0])
        answers[name] = step(DistributedDataParallel(model), [samples[rank]])
    dist.destroy_process_group()
    return answers


def on_one(rank, world):
    """Each case on one process: with all images, and with those that train the last stage."""
    answers = {}
    for name, (head, samples, blind) in CASES.items():
        model = detector(head)
        # Background trains the stages of other heads too.
        teach = [s for i, s in enumerate(samples[:world]) if len(s[1]["labels"]) and i not in blind]
        others = step(model, teach)[1] if teach and head["head"] == "cpm" else {}
        if blind:
            hide_from_last_stage(model, blind)
        answers[name] = *step(model, samples[:world]), others
    return answers


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def gradients(request, tmp_path_factory):
    """Losses and gradients in each case: of one process with all images, and of several with one image each."""
    folder = tmp_path_factory.mktemp("gradients")
    one = together(folder / "one", 1, on_one, request.param)
    each = together(folder / "each", request.param, an_image_each, request.param)
    assert not any(outcome.status for outcome in one + each), [outcome.err for outcome in one + each]
    return one[0].result, [outcome.result for outcome in each]


def farthest(a, b):
    """The largest difference of two tensors, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


# The same numbers are summed in another order in float32 (2^-24 = 6e-8 per addition); 3e-7 and 4e-6 were observed.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-5


@pytest.mark.parametrize("case", CASES)
def test_processes_with_one_image_each_have_the_gradients_of_one_process_with_all_images(gradients, case):
    losses, whole, others = gradients[0][case]
    shares = [answers[case] for answers in gradients[1]]
    expected = ["rpn_objectness", "rpn_box", *LOSSES[CASES[case][0]["head"]]]
    assert list(losses) == [f"loss_{part}" for part in expected]
    for name, loss in losses.items():
        mean = torch.stack([of_process[name] for of_process, _ in shares]).mean()
        assert farthest(mean, loss) < LOSS_TOLERANCE, name
    for name, gradient in whole.items():
        # DDP raises an error if a parameter has no gradient.
        assert all(torch.equal(shares[0][1][name], of_process[name]) for _, of_process in shares), name
        assert farthest(shares[0][1][name], gradient) < GRADIENT_TOLERANCE, name
    # A process without an object or a positive has no influence: the last stage's gradient is that of the others.
    for name, gradient in others.items():
        if name.startswith(("head.stages.2.", "head.ism.")):
            assert gradient.any(), name
            assert farthest(shares[0][1][name], gradient) < GRADIENT_TOLERANCE, name


# --- evaluation ---


def detections(folder):
    found = json.loads((folder / "detections.json").read_text())
    return sorted(found, key=lambda d: (d["image_id"], -d["score"], d["bbox"]))


# On two processes: test_eval_on_two_processes_equals_eval_on_one in test_commands.py.
@pytest.mark.parametrize("images", [5, 2])
def test_evaluation_on_three_processes_equals_one_even_if_three_does_not_divide_the_images(
    command, checkpoint, workplace, tmp_path, images
):
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    own = workplace / f"first_{images}.json"
    kept = content["images"][:images]
    ids = {image["id"] for image in kept}
    content |= {"images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
    own.write_text(json.dumps(content))
    # One image per batch, so that padding does not depend on the distribution of the images.
    options = [
        *(f"ckpt={checkpoint}", f"split={own}", "images=data/shapes/val", "trainer=cpu"),
        *("detector.score_threshold=0.01", "data.eval_batch_size=1"),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = command("eval", *options, "name=on_one")
    torch.set_num_threads(threads)
    each = together(tmp_path, 3, call, workplace, {}, "eval", *options, "trainer.devices=3", "name=on_three")
    assert [outcome.status for outcome in each] == [0, 0, 0], [outcome.err for outcome in each]
    many = workplace / "outputs/on_three"
    assert json.loads((many / "metrics.json").read_text()) == json.loads((one.folder / "metrics.json").read_text())
    assert {d["image_id"] for d in detections(many)} == ids
    assert detections(many) == detections(one.folder)


# --- training ---

STEPS = 12
RUN = [
    *SMALL,
    *(f"schedule.max_steps={STEPS}", f"schedule.val_interval={STEPS}", "schedule.warmup_steps=2"),
    *("schedule.images_per_device=1", "sheet_images=0", "trainer.strategy=ddp"),
]


ONE_MACHINE, TWO_MACHINES = ["trainer.devices=2"], ["trainer.devices=1", "trainer.num_nodes=2"]


def on_two(folder, workplace, faults, *options):
    """The outcomes of a training run with two processes on one machine."""
    return together(folder, 2, call, workplace, faults, "train", *RUN, *ONE_MACHINE, *options)


_whole = {}


@pytest.fixture
def whole(workplace, tmp_path):
    """The last checkpoint of a run with two processes on one machine."""
    if not _whole:
        outcomes = on_two(tmp_path / "whole", workplace, {}, "name=on_two")
        assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
        _whole["checkpoint"] = last_checkpoint(workplace / "outputs" / "on_two")
    return _whole["checkpoint"]


def test_two_machines_end_with_the_weights_of_two_processes_on_one_machine(workplace, whole):
    launches = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "nodes"),
                *("--local-addr", "127.0.0.1", "-m", "cpm_rcnn.train"),
                *(*RUN, *TWO_MACHINES, "name=on_two_machines"),
            ],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for port in [free_port()]
        for _ in range(2)
    ]
    try:
        said = [launch.communicate(timeout=120) for launch in launches]
    finally:
        for launch in launches:
            launch.kill()
    assert [launch.returncode for launch in launches] == [0, 0], said
    assert same_run(last_checkpoint(workplace / "outputs" / "on_two_machines"), whole)


def test_a_signal_to_one_process_stops_both_and_both_resume_to_the_same_weights(workplace, whole, tmp_path):
    name = "one_of_two_stopped"
    outcomes = on_two(tmp_path / "stopped", workplace, {1: Signal(signal.SIGTERM, 3)}, f"name={name}")
    # Only one process per machine exits with the status.
    assert [outcome.status for outcome in outcomes] == [128 + signal.SIGTERM, 0]
    assert "stopped by SIGTERM at step 10" in outcomes[0].out
    assert last_checkpoint(workplace / "outputs" / name)["global_step"] == 10
    outcomes = on_two(tmp_path / "resumed", workplace, {}, f"name={name}", "resume=auto")
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert same_run(last_checkpoint(workplace / "outputs" / name), whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_the_last_validation_ends_the_run_immediately(workplace, tmp_path, rank):
    faults = {0: OlderBest(no_fault)} | {rank: OlderBest(Signal(signal.SIGTERM, 1, "validation_step", "validate"))}
    options = ["schedule.max_steps=1", "data.eval_batch_size=1", f"name=validation_stopped_{rank}"]
    outcomes = on_two(tmp_path, workplace, faults, *options)
    assert outcomes[rank].status == -signal.SIGTERM, outcomes
    assert outcomes[1 - rank].status not in (0, -signal.SIGKILL)
    assert last_checkpoint(workplace / "outputs" / options[-1].removeprefix("name="))["global_step"] == 1


def test_a_signal_in_an_evaluation_ends_it_immediately(checkpoint, workplace, tmp_path):
    faults = {1: Signal(signal.SIGTERM, 1, "validation_step", "validate")}
    options = [f"ckpt={checkpoint}", "trainer=cpu", "trainer.devices=2", "data.eval_batch_size=1", "name=eval_stopped"]
    outcomes = together(tmp_path, 2, call, workplace, faults, "eval", *options)
    assert outcomes[1].status == -signal.SIGTERM
    assert outcomes[0].status not in (0, -signal.SIGKILL)


def test_a_slurm_job_on_two_machines_stops_at_a_signal_to_one_and_resumes(workplace, whole, tmp_path):
    arguments = ["train", *RUN, *TWO_MACHINES, "name=slurm", "resume=auto"]
    faults = {1: Signal(signal.SIGUSR1, 8)}
    outcomes = together(tmp_path / "stopped", 2, call, workplace, faults, *arguments, variables=slurm)
    assert [outcome.status for outcome in outcomes] == [128 + signal.SIGUSR1] * 2, [o.err for o in outcomes]
    assert last_checkpoint(workplace / "outputs" / "slurm")["global_step"] == 10
    outcomes = together(tmp_path / "resumed", 2, call, workplace, {}, *arguments, variables=slurm)
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert same_run(last_checkpoint(workplace / "outputs" / "slurm"), whole)


def test_a_signal_to_the_command_stops_the_processes_that_lightning_started(workplace, trained):
    folder = workplace / "outputs/command_stopped"
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "cpm_rcnn.train", *RUN, *ONE_MACHINE, f"name={folder.name}"),
            *("schedule.max_steps=200", "checkpoint_interval=1"),
        ],
        cwd=workplace,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + 60
        while not (folder / "checkpoints/last.ckpt").exists() and time.monotonic() < end:
            time.sleep(0.05)
        run.terminate()
        said, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in said
    stopped_at = last_checkpoint(workplace / "outputs" / folder.name)["global_step"]
    assert stopped_at < 200
    assert stopped_at % 10 == 0


def test_processes_with_different_folders_use_the_first_process_s(workplace, tmp_path):
    options = ["schedule.max_steps=1", "name=of_rank_${oc.env:RANK}"]
    outcomes = on_two(tmp_path, workplace, {}, *options)
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert (workplace / "outputs/of_rank_0/metrics.json").is_file()


# --- faults ---


@pytest.mark.parametrize("steps", [1, 3])
def test_a_non_finite_loss_on_one_process_is_skipped_on_both(workplace, tmp_path, steps):
    options = [f"schedule.max_steps={steps}", "schedule.warmup_steps=0", "on_nonfinite=skip", f"name=skipped_{steps}"]
    outcomes = on_two(tmp_path, workplace, {1: NotANumber("loss_cls", steps - 1)}, *options)
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert "a loss of another process is not finite; step skipped" in outcomes[0].out + outcomes[0].err
    assert "loss_cls=nan" in outcomes[1].out + outcomes[1].err
    first, second = (outcome.result for outcome in outcomes)
    assert same(first["before"], second["before"])
    assert same(first["after"], second["after"])
    # If there was only one step, it was skipped; if there were several, the others changed the weights.
    assert same(first["before"], first["after"]) == (steps == 1)
    assert all(value.isfinite().all() for value in first["after"].values())


def test_a_non_finite_loss_on_one_process_ends_both(workplace, tmp_path):
    outcomes = on_two(tmp_path, workplace, {1: NotANumber("loss_cls", 1)}, "name=raised_on_two")
    assert [outcome.status for outcome in outcomes] == [2, 2], [outcome.err for outcome in outcomes]
    assert "step 1 (batch 1): a loss of another process is not finite" in outcomes[0].err
    assert "step 1 (batch 1): loss_cls=nan" in outcomes[1].err
    assert (workplace / "outputs/raised_on_two/nonfinite_batch1_rank1.pt").is_file()


@pytest.mark.parametrize(
    ("rank", "fault", "why"),
    [
        (0, Signal(signal.SIGSTOP, 3), "stopped or unreachable"),
        (1, Signal(signal.SIGSTOP, 3), "stopped or unreachable"),
        (1, Hang(3), "hangs"),
    ],
)
def test_a_process_that_does_not_answer_is_named_and_ends_the_run_within_seconds(workplace, tmp_path, rank, fault, why):
    name = f"silent_{rank}_{why[:4]}"
    options = [*RUN, *ONE_MACHINE, "process_timeout=4", f"name={name}"]
    outcomes = together(tmp_path, 2, call, workplace, {rank: fault}, "train", *options, stopped=[rank], timeout=40)
    waiting = outcomes[1 - rank]
    assert waiting.status == 2, waiting.err
    error = [line for line in waiting.err.splitlines() if line.startswith("error: ")]
    assert error == [f"error: rank {rank} did not answer for 4 s ({why}); rank {1 - rank} waited (process_timeout)"]
    if rank == 1:
        assert last_checkpoint(workplace / "outputs" / name)["global_step"] == 3
