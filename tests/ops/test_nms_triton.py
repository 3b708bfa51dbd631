"""The Triton kernels of the non-maximum suppression, compared with torchvision's operator on a CPU.

They run on a GPU if there is one, and otherwise on a CPU under Triton's interpreter, which ``conftest.py`` selects.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cpm_rcnn.kernels import nms_triton as kernels
from cpm_rcnn.ops import nms
from ops import nms_sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")


def nms_mask(boxes, scores, groups, iou_threshold, valid=None):
    boxes, scores, groups, valid = (None if x is None else x.to(DEVICE) for x in (boxes, scores, groups, valid))
    order = nms.sorted_order(scores, groups)
    limit = nms.rounded_threshold(iou_threshold, boxes.dtype)
    return kernels.nms_mask(boxes, groups, order, limit, valid).cpu()


def test_random_cases_equal_torchvision_per_group():
    assert not nms_sweep.run(nms_mask, range(25), longest=150)


def test_boxes_in_several_sections_equal_torchvision(monkeypatch):
    """A group is longer than a section, and kept boxes are read in several chunks."""
    monkeypatch.setattr(kernels, "_SECTION", 128)
    monkeypatch.setattr(kernels, "_SCAN_CHUNK", 64)
    assert not nms_sweep.run(nms_mask, range(100, 112), longest=400)


def test_a_chain_of_boxes_across_blocks_is_resolved():
    """Two neighbors have IoU 0.5, so every other box is kept, and each decision depends on the one before."""
    left = torch.arange(200) / 3
    boxes = torch.stack([left, torch.zeros(200), left + 1, torch.ones(200)], 1)
    mask = nms_mask(boxes, -torch.arange(200).float(), torch.zeros(200, dtype=torch.int64), 0.45)
    assert torch.equal(mask, torch.arange(200) % 2 == 0)


def test_the_operator_uses_the_kernels_on_a_gpu_for_the_dtypes_that_they_support():
    boxes = torch.empty(3, 4, device="meta")
    assert kernels.supports(boxes)
    assert kernels.supports(boxes.double())
    assert not kernels.supports(boxes.half())
    assert not kernels.supports(boxes[:1].expand(2**29, 4))


def test_kernels_compile_for_an_h100():
    """Compile to machine code, which needs no GPU, and check that every operation is rounded."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_nms_for_h100.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 5
    for each in results:
        assert each["bytes"] > 0
        assert each["fused"] == 0, each
        bits = each["dtype"][2:]
        assert each["divisions"] == ([] if each["kernel"] == "_scan" else [f"div.rn.f{bits}"]), each


@pytest.mark.gpu
def test_many_boxes_equal_torchvision_on_a_gpu_without_waiting_for_it():
    assert not nms_sweep.run(nms_mask, range(200, 500))
    torch.manual_seed(0)
    corner = 1000 * torch.rand(40_000, 2)
    boxes, scores = torch.cat([corner, corner + 100 * torch.rand(40_000, 2)], 1), torch.rand(40_000)
    for groups in (torch.randint(3, (40_000,)), torch.randint(500, (40_000,))):
        expected = nms.nms_mask(boxes, scores, groups, 0.5)
        given = (boxes.cuda(), scores.cuda(), groups.cuda(), 0.5)
        nms.nms_mask(*given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask = nms.nms_mask(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(mask.cpu(), expected)
