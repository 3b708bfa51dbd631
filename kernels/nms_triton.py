"""Non-maximum suppression on a GPU in Triton. The host never waits for the device.

Boxes are sorted by group and, within a group, by descending score. They are processed in *sections* of at most
``_SECTION`` rows, which bounds the memory:

1. ``_remove_by_earlier`` removes the section's boxes that a kept box of an earlier section suppresses.
2. ``_find_bits`` computes the suppression matrix of the section. Each program compares 64 boxes with 64 others of the
   same groups, and stores one bit per pair.
3. ``_scan`` applies the matrix in order. Each program processes one run of consecutive blocks of 64 boxes that share
   groups; different runs are processed in parallel.

The arithmetic is that of torchvision's operator on a CPU: the same operations in the same order, each rounded.
Therefore, the kernels are compiled without fused multiply-adds, and divisions are rounded correctly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The bits of a word of the matrix.
_BLOCK = 64
# The matrix of a section takes 32 MiB.
_SECTION = 1 << 14
# The words or boxes that a program of _scan or _remove_by_earlier reads at a time.
_SCAN_CHUNK = 1024
_REMOVE_CHUNK = 64
# Coordinates are numbered with 32 bits. This leaves room for the last, incomplete block.
_MAX_ROWS = 2**29 - _SECTION


def supports(boxes: Tensor) -> bool:
    """Return whether the kernels support these boxes: float32 or float64, and at most about 2^29 of them."""
    return boxes.dtype in (torch.float32, torch.float64) and len(boxes) <= _MAX_ROWS


def nms_mask(boxes: Tensor, groups: Tensor, order: Tensor, limit: float, valid: Tensor | None) -> Tensor:
    """Return the mask (R,) of the kept rows. See :func:`cpm_rcnn.ops.nms.nms_mask`.

    Args:
        boxes: (R, 4) float32 or float64.
        groups: (R,) int64.
        order: (R,) int64, the rows sorted by group, then best first.
        limit: the threshold, which the dtype of ``boxes`` represents exactly.
        valid: (R,) bool, or None.
    """
    count = len(boxes)
    boxes, groups = boxes[order].contiguous(), groups[order]
    kept = torch.ones_like(groups, dtype=torch.int8) if valid is None else valid[order].to(torch.int8)
    # A float argument of a Triton kernel would be converted to float32.
    threshold = torch.full((1,), limit, dtype=boxes.dtype, device=boxes.device)
    pitch = triton.cdiv(min(count, _SECTION), _BLOCK) * _BLOCK
    bits = torch.empty(pitch // _BLOCK * pitch, dtype=torch.int64, device=boxes.device)
    for first in range(0, count, _SECTION):
        last = min(first + _SECTION, count)
        blocks = triton.cdiv(last - first, _BLOCK)
        if first:
            _remove_by_earlier[(blocks,)](
                boxes, groups, kept, threshold, first, last, BLOCK=_BLOCK, CHUNK=_REMOVE_CHUNK, enable_fp_fusion=False
            )
        _find_bits[(blocks, blocks)](
            boxes, groups, threshold, bits, first, last, pitch, BLOCK=_BLOCK, enable_fp_fusion=False
        )
        _scan[(blocks,)](groups, bits, kept, first, last, pitch, BLOCK=_BLOCK, CHUNK=_SCAN_CHUNK)
    return torch.empty_like(kept).scatter_(0, order, kept).bool()


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _load_box(boxes, rows, exists):
    """Return x1, y1, x2, y2 and area of these boxes. Boxes that do not exist are NaN, which suppress no box."""
    other = float("nan")
    x1 = tl.load(boxes + 4 * rows, mask=exists, other=other)
    y1 = tl.load(boxes + 4 * rows + 1, mask=exists, other=other)
    x2 = tl.load(boxes + 4 * rows + 2, mask=exists, other=other)
    y2 = tl.load(boxes + 4 * rows + 3, mask=exists, other=other)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def _suppresses(boxes, groups, threshold, rows, rows_exist, columns, columns_exist):
    """Return whether each of the better boxes ``rows`` (N,) would suppress each of the boxes ``columns`` (M,)."""
    ax1, ay1, ax2, ay2, area_a = _load_box(boxes, rows, rows_exist)
    bx1, by1, bx2, by2, area_b = _load_box(boxes, columns, columns_exist)
    ax1, ay1, ax2, ay2, area_a = ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None], area_a[:, None]
    bx1, by1, bx2, by2, area_b = bx1[None], by1[None], bx2[None], by2[None], area_b[None]
    # If either number is NaN, the result is the better box's, as in torchvision.
    width = tl.where(bx2 < ax2, bx2, ax2) - tl.where(ax1 < bx1, bx1, ax1)
    height = tl.where(by2 < ay2, by2, ay2) - tl.where(ay1 < by1, by1, ay1)
    width, height = tl.where(width > 0, width, 0.0), tl.where(height > 0, height, 0.0)
    overlap = width * height
    union = area_a + area_b - overlap
    # In float32, the operator / is not rounded correctly.
    iou = tl.div_rn(overlap, union) if overlap.dtype == tl.float32 else overlap / union
    group_a = tl.load(groups + rows, mask=rows_exist, other=0)[:, None]
    group_b = tl.load(groups + columns, mask=columns_exist, other=0)[None]
    return (iou > tl.load(threshold)) & (group_a == group_b)


@triton.jit
def _remove_by_earlier(boxes, groups, kept, threshold, first, last, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Remove the boxes of one block that a kept box before row ``first`` suppresses."""
    start = first + tl.program_id(0) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    exists = columns < last
    group = tl.load(groups + start)
    removed = tl.zeros((BLOCK,), dtype=tl.int32)
    end = first
    # Rows are sorted by group: go back as long as they have the group of the block's first row.
    same = tl.load(groups + end - 1) == group
    while same:
        rows = end - CHUNK + tl.arange(0, CHUNK)
        is_kept = tl.load(kept + rows, mask=rows >= 0, other=0) != 0
        found = _suppresses(boxes, groups, threshold, rows, is_kept, columns, exists)
        removed = removed | tl.max(found.to(tl.int32), axis=0)
        end -= CHUNK
        same = (end > 0) & (tl.load(groups + end - 1, mask=end > 0, other=0) == group)
    tl.store(kept + columns, tl.zeros((BLOCK,), dtype=tl.int8), mask=exists & (removed != 0))


@triton.jit
def _find_bits(boxes, groups, threshold, bits, first, last, pitch, BLOCK: tl.constexpr):
    """Store bit j of word [column block, row] if the row suppresses the box j of the block and is better."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    column_start = first + column_block * BLOCK
    row_start = first + row_block * BLOCK
    # Rows are sorted by group, so different groups here mean that no row has the group of a column.
    row_end = tl.minimum(row_start + BLOCK, last) - 1
    if (row_block <= column_block) & (
        (row_block == column_block) | (tl.load(groups + row_end) == tl.load(groups + column_start))
    ):
        rows, columns = row_start + tl.arange(0, BLOCK), column_start + tl.arange(0, BLOCK)
        found = _suppresses(boxes, groups, threshold, rows, rows < last, columns, columns < last)
        found = found & (rows[:, None] < columns[None])
        bit = tl.full((BLOCK,), 1, dtype=tl.int64) << tl.arange(0, BLOCK).to(tl.int64)
        words = tl.sum(tl.where(found, bit[None], 0), axis=1)
        tl.store(bits + column_block * pitch + row_block * BLOCK + tl.arange(0, BLOCK), words)


@triton.jit
def _scan(groups, bits, kept, first, last, pitch, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Greedy NMS of one run of blocks, block by block. ``kept`` holds the candidates before and the result after."""
    block = tl.program_id(0)
    start = first + block * BLOCK
    before = tl.load(groups + start - 1, mask=block > 0, other=0)
    # A run starts where no group continues from the block before.
    active = (block == 0) | (before != tl.load(groups + start))
    # The block with the first box of the group to which this block's first box belongs.
    group_block = block
    lanes = tl.arange(0, BLOCK)
    while active:
        start = first + block * BLOCK
        # Bit j is set if a kept box of an earlier block suppresses box j.
        words = tl.zeros((CHUNK,), dtype=tl.int64)
        for chunk in range(group_block * BLOCK, block * BLOCK, CHUNK):
            rows = chunk + tl.arange(0, CHUNK)
            is_kept = tl.load(kept + first + rows, mask=rows < block * BLOCK, other=0) != 0
            words = words | tl.load(bits + block * pitch + rows, mask=is_kept, other=0)
        removed = tl.reduce(words, 0, _either)
        candidates = tl.load(kept + start + lanes, mask=start + lanes < last, other=0)
        bit = tl.full((BLOCK,), 1, dtype=tl.int64) << lanes.to(tl.int64)
        removed = removed | tl.sum(tl.where(candidates == 0, bit, 0), axis=0)
        for lane in range(BLOCK):
            word = tl.load(bits + block * pitch + block * BLOCK + lane)
            removed = removed | tl.where(((removed >> lane) & 1) == 0, word, 0)
        result = ((removed >> lanes.to(tl.int64)) & 1) == 0
        tl.store(kept + start + lanes, result.to(tl.int8), mask=start + lanes < last)
        # The next block reads what other threads of this program have stored.
        tl.debug_barrier()
        following = start + BLOCK
        more = following < last
        group = tl.load(groups + following, mask=more, other=0)
        active = more & (tl.load(groups + following - 1, mask=more, other=0) == group)
        group_block = tl.where(tl.load(groups + start) == group, group_block, block)
        block += 1
