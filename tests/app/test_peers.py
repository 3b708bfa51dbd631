"""Detectors of other programs: convert, then the detections that these programs compute, and eval like any other."""

import json
import pickle

import numpy as np
import pytest
import torch
from runs import metrics, refused
from torchvision.io import write_png

from cpm_rcnn import load
from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from peer_files import (
    PEER_CASES,
    PEERS,
    legacy_names,
    peer_image,
    peer_state,
    read_peer,
    small_state,
    torchvision_model,
)

MMDET_2 = """
model = dict(
    type='CascadeRCNN',
    backbone=dict(type='ResNet', depth=50, style='pytorch', norm_cfg=dict(type='BN', requires_grad=True)),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""
NAMES = [category["name"] for category in COCO_CATEGORIES]
RGB = "RGB, mean 123.675, 116.28, 103.53, std 58.395, 57.12, 57.375 of 0..255, stride in the 3x3 convolutions"
MSRA = "BGR, mean 103.53, 116.28, 123.675, std 1, 1, 1 of 0..255, stride in the 1x1 convolutions"
# For each case: what convert prints, without the path.
PRINTED = {
    "d2_faster_r50": ["detectron2 Faster R-CNN, resnet50, 80 classes; 41.8 million values", f"note: input: {MSRA}"],
    "d2_cascade_r50": [
        "detectron2 Cascade R-CNN, resnet50, 80 classes; 69.4 million values",
        f"note: input: {MSRA}",
        "note: the mask head of the file is not used",
    ],
    "mmdet_cascade_r50": [
        "mmdetection Cascade R-CNN, resnet50, 80 classes; 69.4 million values",
        f"note: input: {RGB} (from the configuration in the file)",
    ],
    "mmdet_grid_r50": [
        "mmdetection Grid R-CNN, resnet50, 80 classes; 64.5 million values",
        f"note: input: {RGB} (style pytorch, estimated from the first layer; set backbone.input_format if it differs)",
    ],
}


def write_case(case, folder):
    """A reference case's file in the form in which its program publishes it."""
    state = peer_state(case)
    if case == "d2_faster_r50":
        file = folder / "model_final.pkl"
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "Detectron2 Model Zoo"}
        file.write_bytes(pickle.dumps(content))
        return file
    file = folder / "model.pth"
    if case == "d2_cascade_r50":
        mask = {"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(256, 256, 3, 3)}
        torch.save({"model": state | mask, "iteration": 269999}, file)
    elif case == "mmdet_cascade_r50":
        meta = {"config": MMDET_2, "CLASSES": tuple(NAMES), "mmdet_version": "2.4.0", "epoch": 20}
        # mmdetection's tools write torch's old format.
        torch.save({"meta": meta, "state_dict": state}, file, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, file)
    return file


def sample(feature):
    flat = feature.contiguous().flatten()
    return flat[:: max(1, flat.numel() // 512)][:512].numpy()


def share_found(found, boxes, scores, labels):
    """The share of expected detections that are among ``found``: same label, 0.05 pixels, 1e-4 of score."""
    ours = found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()
    close = [
        ((ours[2] == label) & (np.abs(ours[0] - box).max(1) < 0.05) & (np.abs(ours[1] - score) < 1e-4)).any()
        for box, score, label in zip(boxes, scores, labels)
    ]
    assert len(close) == len(found) == 100
    return np.mean(close)


@pytest.mark.parametrize("case", PEER_CASES)
def test_a_converted_detector_finds_what_its_program_finds(command, tmp_path, case):
    file = write_case(case, tmp_path)
    answer = command("convert", f"src={file}", f"dst={tmp_path}/converted.ckpt")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines() == [*PRINTED[case], f"{tmp_path}/converted.ckpt"]
    file.unlink()

    expected = np.load(PEERS / f"{case}.npz")
    detector = load(
        tmp_path / "converted.ckpt", score_threshold=read_peer(case)["score_threshold"], test_short_side=None
    )
    (tmp_path / "converted.ckpt").unlink()
    assert detector.categories == COCO_CATEGORIES
    model, image = detector.model, peer_image(case)
    kept = {}
    model.backbone.register_forward_hook(lambda module, inputs, output: kept.update(output))
    model.rpn.register_forward_hook(lambda module, inputs, output: kept.update(proposals=output[0]))
    (found,) = detector.detect([image])
    for name in ("p2", "p3", "p4", "p5", "p6"):
        spread = expected[f"{name}_sample"].std()
        np.testing.assert_allclose(sample(kept[name]), expected[f"{name}_sample"], atol=1e-3 * spread, rtol=0)
    nearest = np.abs(expected["proposals"][:, None] - kept["proposals"].boxes.numpy()).max(-1).min(1)
    assert (nearest < 0.05).mean() >= 0.99
    assert len(kept["proposals"]) == len(nearest)
    assert share_found(found, *(expected[f"final_{key}"] for key in ("boxes", "scores", "labels"))) >= 0.99


def test_a_converted_detector_of_torchvision_finds_what_torchvision_finds(command, tmp_path):
    model = torchvision_model((3, 4, 6, 3), fpn=256, mlp=1024)
    # The published file has the names of an older version.
    torch.save(legacy_names(model.state_dict()), tmp_path / "model.pth")
    answer = command("convert", f"src={tmp_path}/model.pth", f"dst={tmp_path}/converted.ckpt")
    assert answer.status == 0, answer.err
    assert "torchvision Faster R-CNN, resnet50, 90 classes; 41.8 million values" in answer.out
    assert "10 of the classes are not in COCO's data" in answer.out
    detector = load(tmp_path / "converted.ckpt", test_short_side=None)
    image = peer_image("d2_faster_r50")[:, :, :288]
    (found,) = detector.detect([image])
    with torch.inference_mode():
        (theirs,) = model([image.float() / 255])
    assert len(theirs["labels"].unique()) > 3
    assert theirs["scores"].min() < 0.95 * theirs["scores"].max()
    assert share_found(found, *(theirs[key].numpy() for key in ("boxes", "scores", "labels"))) >= 0.99


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two pictures in COCO's format, with COCO's 80 classes."""
    root = tmp_path_factory.mktemp("photographs")
    images, annotations = [], []
    for i in range(2):
        image = peer_image("d2_faster_r50")[:, : 160 + 32 * i]
        write_png(image, str(root / f"{i}.png"))
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": image.shape[1], "width": image.shape[2]})
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 90, "bbox": [10, 20, 60, 70], "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}
    (root / "coco.json").write_text(json.dumps(content))
    return root


def test_torchvision_s_detector_is_evaluated_on_coco_s_80_classes(command, tmp_path, photographs):
    torch.save(torchvision_model().state_dict(), tmp_path / "model.pth")
    checkpoint = tmp_path / "converted.ckpt"
    answer = command("convert", f"src={tmp_path}/model.pth", f"dst={checkpoint}", "detector.score_threshold=0.001")
    assert answer.status == 0, answer.err
    arguments = ["data.num_workers=0", "data.test_short_side=160", "trainer=cpu"]
    answer = command(
        "eval", f"ckpt={checkpoint}", f"split={photographs}/coco.json", f"images={photographs}", *arguments
    )
    assert answer.status == 0, answer.err
    assert list(metrics(answer.folder)["per_class"]) == NAMES
    found = {each["category_id"] for each in json.loads((answer.folder / "detections.json").read_text())}
    assert found <= {category["id"] for category in COCO_CATEGORIES}
    # predict reports all classes of the model.
    answer = command("predict", f"ckpt={checkpoint}", f"source={photographs}/0.png", "min_score=0")
    assert answer.status == 0, answer.err
    found = {each["category_id"] for each in json.loads((answer.folder / "detections.json").read_text())}
    assert found - {category["id"] for category in COCO_CATEGORIES}


@pytest.mark.parametrize("case", [*PEER_CASES, "torchvision"])
def test_nothing_is_written_if_a_file_is_damaged(command, tmp_path, case):
    state = small_state(case)
    name = next(name for name in state if "rpn" in name)
    state[name] = torch.full(state[name].shape, float("inf"))
    torch.save(state, tmp_path / "model.pth")
    line = refused(command("convert", f"src={tmp_path}/model.pth", f"dst={tmp_path}/out/converted.ckpt"))
    assert f"src={tmp_path}/model.pth: 1 of " in line
    assert f"tensors have non-finite values: {name}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_the_input_format_can_be_set_and_classes_need_a_json_if_the_file_does_not_name_them(command, tmp_path):
    state = small_state("mmdet_cascade_r50")
    torch.save(state, tmp_path / "model.pth")
    arguments = [f"src={tmp_path}/model.pth", f"dst={tmp_path}/converted.ckpt"]
    line = refused(command("convert", *arguments, "backbone.input_format=bgr"))
    assert "backbone.input_format=bgr: must be one of rgb, caffe, timm" in line
    answer = command("convert", *arguments, "backbone.input_format=caffe", "detector.max_detections=7")
    assert answer.status == 0, answer.err
    assert f"note: input: {MSRA} (as given)" in answer.out
    detector = load(tmp_path / "converted.ckpt")
    assert detector.model.head.settings.max_detections == 7
    assert "detector.test_stages" in refused(command("convert", *arguments[:1], "dst=x.ckpt", "detector.test_stages=1"))
    few = {k: v[:21] if "fc_cls" in k else v for k, v in state.items()}
    torch.save(few, tmp_path / "model.pth")
    line = refused(command("convert", *arguments[:1], f"dst={tmp_path}/few.ckpt"))
    assert "has 20 classes, but COCO has 80; give the annotations that the file was trained on" in line
