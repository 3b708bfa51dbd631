"""Deformable convolution on a GPU in Triton: forward and backward.

One program computes one tile: ``BLOCK_M`` output pixels of one *pack*. A pack is a run of consecutive channel groups
that together are wide enough for tensor cores. For each tap, the program loads the four corners of each sample from
channels-last memory, where a corner's channels are contiguous, interpolates them in float32, and multiplies them by the
weights of the pack, which form a block-diagonal matrix. The column matrix is only held in registers.

Offsets may have any floating-point dtype. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The target number of channels in a pack, chosen so that a corner is one wide load and tensor cores are used. It is
# smaller in float32, where multiplying by the zeros of the block-diagonal matrix costs more.
_PACK_CHANNELS = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}
_BLOCK_M = 64
_MAX_BLOCK = 64
# The weight gradient is computed as this many partial sums over blocks of pixels, so that there are enough programs to
# occupy the GPU. The partial sums are added at the end.
_WEIGHT_SPLITS = 64
# Pixels and packed weights are numbered with 32 bits. This leaves room for the last, incomplete block of each program.
_MAX_INDEX = 2**31 - 1 - _BLOCK_M * _WEIGHT_SPLITS


def supports(input: Tensor, offset: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels support this case.

    They support float32, float16 and bfloat16, if one of the numbers of groups and of offset groups divides the other,
    and if the output pixels of the batch and the packed weights can be numbered with 32 bits.
    """
    if input.dtype not in _PACK_CHANNELS:
        return False
    groups = input.shape[1] // weight.shape[1]
    offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    if groups % offset_groups and offset_groups % groups:
        return False
    plan = Plan(input, offset, weight)
    return max(plan.pixels, plan.packs * plan.taps * plan.pack_in * plan.pack_out) <= _MAX_INDEX


class Plan:
    """The division of one convolution into programs.

    :func:`supports` must be true for the arguments.

    Args:
        input: (N, C, H, W) tensor.
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out) tensor.
        weight: (C_out, C / groups, kh, kw) tensor.
    """

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor) -> None:
        self.batch, self.channels, self.height, self.width = input.shape
        self.out_channels, self.group_in, self.kernel_h, self.kernel_w = weight.shape
        self.out_h, self.out_w = offset.shape[-2:]
        self.taps = self.kernel_h * self.kernel_w
        self.groups = self.channels // self.group_in
        self.group_out = self.out_channels // self.groups
        self.offset_groups = offset.shape[1] // (2 * self.taps)
        # A pack may only contain groups that share one offset group.
        together = max(self.groups // self.offset_groups, 1)
        width = max(self.group_in, self.group_out)
        self.per_pack = max(
            (n for n in range(1, together + 1) if together % n == 0 and n * width <= _PACK_CHANNELS[input.dtype]),
            default=1,
        )
        self.packs = self.groups // self.per_pack
        self.pack_in = self.per_pack * self.group_in
        self.pack_out = self.per_pack * self.group_out
        # If a group has several offset groups, the channels of a pack are divided into pieces, one per offset group.
        # Each piece is processed in blocks.
        self.pieces = max(self.offset_groups // self.groups, 1)
        self.piece = self.pack_in // self.pieces
        self.block_k = _block(self.piece)
        self.block_n = _block(self.pack_out)
        self.blocks_k = triton.cdiv(self.piece, self.block_k)
        self.blocks_n = triton.cdiv(self.pack_out, self.block_n)
        self.pixels = self.batch * self.out_h * self.out_w

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Return the weight as (packs, taps, pack_in, pack_out), block-diagonal over the groups of a pack."""
        groups = weight.view(self.packs, self.per_pack, self.group_out, self.group_in, self.taps)
        packed = weight.new_zeros(self.packs, self.taps, self.per_pack, self.group_in, self.per_pack, self.group_out)
        diagonal = torch.arange(self.per_pack, device=weight.device)
        packed[:, :, diagonal, :, diagonal] = groups.permute(1, 0, 4, 3, 2)
        return packed.view(self.packs, self.taps, self.pack_in, self.pack_out)

    def unpack_weight(self, packed: Tensor) -> Tensor:
        """Return the weight (C_out, C / groups, kh, kw) from the result of :meth:`pack_weight`."""
        blocks = packed.view(self.packs, self.taps, self.per_pack, self.group_in, self.per_pack, self.group_out)
        diagonal = torch.arange(self.per_pack, device=packed.device)
        groups = blocks[:, :, diagonal, :, diagonal]  # (per_pack, packs, taps, group_in, group_out)
        return groups.permute(1, 0, 4, 3, 2).reshape(self.out_channels, self.group_in, self.kernel_h, self.kernel_w)

    def constants(self, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> dict[str, int]:
        """Return the compile-time arguments of the kernels."""
        return {
            "H": self.height,
            "W": self.width,
            "H_OUT": self.out_h,
            "W_OUT": self.out_w,
            "C": self.channels,
            "C_OUT": self.out_channels,
            "KERNEL_W": self.kernel_w,
            "TAPS": self.taps,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "OFFSET_GROUPS": self.offset_groups,
            "PACKS": self.packs,
            "PACK_IN": self.pack_in,
            "PACK_OUT": self.pack_out,
            "PIECES": self.pieces,
            "PIECE": self.piece,
            "BLOCK_M": _BLOCK_M,
            "BLOCK_K": self.block_k,
            "BLOCK_N": self.block_n,
        }


def forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Compute the convolution without bias.

    Returns:
        (N, C_out, H_out, W_out) tensor in the dtype of ``input``, in channels-last memory format.
    """
    plan = Plan(input, offset, weight)
    output = input.new_empty(plan.batch, plan.out_h, plan.out_w, plan.out_channels)
    if output.numel():
        grid = (triton.cdiv(plan.pixels, _BLOCK_M), plan.packs * plan.blocks_n)
        _forward[grid](
            _channels_last(input),
            offset.contiguous(),
            offset if mask is None else mask.contiguous(),
            plan.pack_weight(weight),
            output,
            plan.pixels,
            **plan.constants(stride, padding, dilation),
            HAS_MASK=mask is not None,
            PRECISION=_precision(),
        )
    return output.permute(0, 3, 1, 2)


def backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, offset, mask and weight.

    The gradients of input, offset and mask are summed with atomic additions in float32, so their last bits may depend
    on the order in which programs run.

    Returns:
        One gradient per tensor, in the tensor's dtype, or None where ``needed`` is false.
    """
    plan = Plan(input, offset, weight)
    constants = plan.constants(stride, padding, dilation)
    image, offset_, grad = _channels_last(input), offset.contiguous(), _channels_last(grad_output)
    mask_ = offset_ if mask is None else mask.contiguous()
    grad_input = torch.zeros(image.shape, dtype=torch.float32, device=input.device)
    grad_offset = torch.zeros(offset.shape, dtype=torch.float32, device=input.device)
    grad_mask = None if mask is None else torch.zeros(mask.shape, dtype=torch.float32, device=input.device)
    if plan.pixels and any(needed[:3]):
        grid = (triton.cdiv(plan.pixels, _BLOCK_M), plan.packs * plan.pieces * plan.blocks_k)
        _backward_data[grid](
            grad,
            image,
            offset_,
            mask_,
            plan.pack_weight(weight),
            grad_input,
            grad_offset,
            grad_offset if grad_mask is None else grad_mask,
            plan.pixels,
            **constants,
            HAS_MASK=mask is not None,
            NEEDS_INPUT=needed[0],
            PRECISION=_precision(),
        )
    grad_weight = None
    if needed[3]:
        blocks = triton.cdiv(plan.pixels, _BLOCK_M)
        splits = max(min(_WEIGHT_SPLITS, blocks), 1)
        partial = torch.zeros(
            (splits, plan.packs, plan.taps, plan.pack_in, plan.pack_out), dtype=torch.float32, device=input.device
        )
        if plan.pixels:
            grid = (splits, plan.packs * plan.taps, plan.pieces * plan.blocks_k * plan.blocks_n)
            _backward_weight[grid](
                grad,
                image,
                offset_,
                mask_,
                partial,
                plan.pixels,
                triton.cdiv(blocks, splits),
                **constants,
                HAS_MASK=mask is not None,
                PRECISION=_precision(),
            )
        grad_weight = plan.unpack_weight(partial.sum(0)).to(weight.dtype)
    return (
        grad_input.permute(0, 3, 1, 2).to(input.dtype) if needed[0] else None,
        grad_offset.to(offset.dtype) if needed[1] else None,
        grad_mask.to(mask.dtype) if needed[2] and mask is not None and grad_mask is not None else None,
        grad_weight,
    )


def _block(channels: int) -> int:
    """Return a block size for this many channels: a power of two from 16, the minimum of tl.dot, to _MAX_BLOCK."""
    return min(max(triton.next_power_of_2(channels), 16), _MAX_BLOCK)


def _channels_last(x: Tensor) -> Tensor:
    """Return (N, C, H, W) as a contiguous (N, H, W, C) tensor."""
    return x.permute(0, 2, 3, 1).contiguous()


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def _pixel(rows, pixels, H_OUT: tl.constexpr, W_OUT: tl.constexpr):
    """Return the image, row and column of the output pixels with these numbers, and whether each pixel exists."""
    valid = rows < pixels
    within = rows % (H_OUT * W_OUT)
    return (rows // (H_OUT * W_OUT)).to(tl.int64), within // W_OUT, within % W_OUT, valid


@triton.jit
def _sample_at(
    offset, mask, n, row, column, valid, tap, offset_group,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr, KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_GROUPS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return where a tap of each pixel samples the input.

    The results are the floor of y and x, the fractions of y and x, whether any corner is inside the image, the mask
    factor, and whether the gradient of the offset is not zero.

    The fractions of a sample with a NaN or infinite offset are NaN, and none of its corners is inside the image: the
    sample becomes NaN, and no input's gradient does.
    """
    plane: tl.constexpr = H_OUT * W_OUT
    place = row * W_OUT + column
    channel = (n * OFFSET_GROUPS + offset_group) * TAPS + tap
    dy = tl.load(offset + channel * (2 * plane) + place, mask=valid, other=0.0).to(tl.float32)
    dx = tl.load(offset + channel * (2 * plane) + plane + place, mask=valid, other=0.0).to(tl.float32)
    y = (row * STRIDE_H - PAD_H + tap // KERNEL_W * DILATION_H).to(tl.float32) + dy
    x = (column * STRIDE_W - PAD_W + tap % KERNEL_W * DILATION_W).to(tl.float32) + dx
    # Comparisons with NaN are false.
    inside = valid & (y >= -1) & (y < H) & (x >= -1) & (x < W)
    # The difference of a number from itself is 0, or NaN if the number is not finite.
    lost = (y - y) + (x - x)
    y, x = tl.where(inside, y, 0.0), tl.where(inside, x, 0.0)
    y0, x0 = tl.floor(y), tl.floor(x)
    ly, lx = tl.where(inside, y - y0, lost), tl.where(inside, x - x0, lost)
    factor = tl.load(mask + channel * plane + place, mask=valid, other=0.0).to(tl.float32) if HAS_MASK else 1.0
    moves = inside | (valid & (lost + 0 * factor != 0))
    return y0.to(tl.int32), x0.to(tl.int32), ly, lx, inside, factor, moves


@triton.jit
def _corner(n, y, x, inside, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Return the index of a corner's first channel, and whether the corner is inside the image."""
    return ((n * H + y) * W + x) * C, inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _gather(image, n, y0, x0, inside, channels, valid_k, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Load the four corners of each pixel's sample, each (BLOCK_M, BLOCK_K) in float32 and zero outside the image."""
    s00, i00 = _corner(n, y0, x0, inside, H, W, C)
    s01, i01 = _corner(n, y0, x0 + 1, inside, H, W, C)
    s10, i10 = _corner(n, y0 + 1, x0, inside, H, W, C)
    s11, i11 = _corner(n, y0 + 1, x0 + 1, inside, H, W, C)
    v00 = tl.load(image + s00[:, None] + channels[None], mask=i00[:, None] & valid_k[None], other=0.0).to(tl.float32)
    v01 = tl.load(image + s01[:, None] + channels[None], mask=i01[:, None] & valid_k[None], other=0.0).to(tl.float32)
    v10 = tl.load(image + s10[:, None] + channels[None], mask=i10[:, None] & valid_k[None], other=0.0).to(tl.float32)
    v11 = tl.load(image + s11[:, None] + channels[None], mask=i11[:, None] & valid_k[None], other=0.0).to(tl.float32)
    return v00, v01, v10, v11


@triton.jit
def _bilinear(v00, v01, v10, v11, ly, lx):
    """Interpolate corners (BLOCK_M, BLOCK_K) bilinearly at fractions (BLOCK_M,)."""
    ly, lx = ly[:, None], lx[:, None]
    return (1 - ly) * ((1 - lx) * v00 + lx * v01) + ly * ((1 - lx) * v10 + lx * v11)


@triton.jit
def _forward(
    image, offset, mask, weight, output, pixels,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    PACKS: tl.constexpr, PACK_IN: tl.constexpr, PACK_OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_n: tl.constexpr = (PACK_OUT + BLOCK_N - 1) // BLOCK_N
    pack = tl.program_id(1) // blocks_n
    outputs = tl.program_id(1) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = outputs < PACK_OUT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, row, column, valid = _pixel(rows, pixels, H_OUT, W_OUT)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for piece in range(PIECES):
        offset_group = (pack * PIECES + piece) * OFFSET_GROUPS // (PACKS * PIECES)
        for tap in range(TAPS):
            y0, x0, ly, lx, inside, factor, _ = _sample_at(
                offset, mask, n, row, column, valid, tap, offset_group, H, W, H_OUT, W_OUT, KERNEL_W, TAPS,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_GROUPS, HAS_MASK,
            )  # fmt: skip
            for start in range(0, PIECE, BLOCK_K):
                inner = start + tl.arange(0, BLOCK_K)
                valid_k = inner < PIECE
                inputs = piece * PIECE + inner
                v00, v01, v10, v11 = _gather(image, n, y0, x0, inside, pack * PACK_IN + inputs, valid_k, H, W, C)
                value = _bilinear(v00, v01, v10, v11, ly, lx)
                if HAS_MASK:
                    value = value * factor[:, None]
                place = ((pack * TAPS + tap) * PACK_IN + inputs)[:, None] * PACK_OUT + outputs[None]
                matrix = tl.load(weight + place, mask=valid_k[:, None] & valid_n[None], other=0.0)
                total = tl.dot(value.to(matrix.dtype), matrix, total, input_precision=PRECISION)
    place = rows.to(tl.int64)[:, None] * C_OUT + pack * PACK_OUT + outputs[None]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=valid[:, None] & valid_n[None])


@triton.jit
def _backward_data(
    grad, image, offset, mask, weight, grad_input, grad_offset, grad_mask, pixels,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    PACKS: tl.constexpr, PACK_IN: tl.constexpr, PACK_OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    NEEDS_INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of input, offset and mask. Each program processes one block of input channels."""
    blocks_k: tl.constexpr = (PIECE + BLOCK_K - 1) // BLOCK_K
    pack = tl.program_id(1) // (PIECES * blocks_k)
    piece = tl.program_id(1) // blocks_k % PIECES
    inner = tl.program_id(1) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    valid_k = inner < PIECE
    inputs = piece * PIECE + inner
    offset_group = (pack * PIECES + piece) * OFFSET_GROUPS // (PACKS * PIECES)
    channels = pack * PACK_IN + inputs
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, row, column, valid = _pixel(rows, pixels, H_OUT, W_OUT)
    plane: tl.constexpr = H_OUT * W_OUT
    for tap in range(TAPS):
        # The gradient of the sampled values: the output gradient times the transposed weights.
        grad_sample = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for start in range(0, PACK_OUT, BLOCK_N):
            outputs = start + tl.arange(0, BLOCK_N)
            valid_n = outputs < PACK_OUT
            place = rows.to(tl.int64)[:, None] * C_OUT + pack * PACK_OUT + outputs[None]
            grad_out = tl.load(grad + place, mask=valid[:, None] & valid_n[None], other=0.0)
            place = ((pack * TAPS + tap) * PACK_IN + inputs)[None] * PACK_OUT + outputs[:, None]
            matrix = tl.load(weight + place, mask=valid_k[None] & valid_n[:, None], other=0.0)
            grad_sample = tl.dot(grad_out.to(matrix.dtype), matrix, grad_sample, input_precision=PRECISION)
        y0, x0, ly, lx, inside, factor, moves = _sample_at(
            offset, mask, n, row, column, valid, tap, offset_group, H, W, H_OUT, W_OUT, KERNEL_W, TAPS,
            STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_GROUPS, HAS_MASK,
        )  # fmt: skip
        v00, v01, v10, v11 = _gather(image, n, y0, x0, inside, channels, valid_k, H, W, C)
        place = (n * OFFSET_GROUPS + offset_group) * TAPS + tap
        pixel = row * W_OUT + column
        if HAS_MASK:
            sampled = tl.sum(grad_sample * _bilinear(v00, v01, v10, v11, ly, lx), axis=1)
            tl.atomic_add(grad_mask + place * plane + pixel, sampled, mask=valid, sem="relaxed")
            grad_sample = grad_sample * factor[:, None]
        fy, fx = ly[:, None], lx[:, None]
        along_y = tl.sum(grad_sample * ((1 - fx) * (v10 - v00) + fx * (v11 - v01)), axis=1)
        along_x = tl.sum(grad_sample * ((1 - fy) * (v01 - v00) + fy * (v11 - v10)), axis=1)
        tl.atomic_add(grad_offset + place * (2 * plane) + pixel, along_y, mask=moves, sem="relaxed")
        tl.atomic_add(grad_offset + place * (2 * plane) + plane + pixel, along_x, mask=moves, sem="relaxed")
        if NEEDS_INPUT:
            s00, i00 = _corner(n, y0, x0, inside, H, W, C)
            s01, i01 = _corner(n, y0, x0 + 1, inside, H, W, C)
            s10, i10 = _corner(n, y0 + 1, x0, inside, H, W, C)
            s11, i11 = _corner(n, y0 + 1, x0 + 1, inside, H, W, C)
            to, all_ = grad_input + channels[None], valid_k[None]
            tl.atomic_add(to + s00[:, None], grad_sample * (1 - fy) * (1 - fx), mask=i00[:, None] & all_, sem="relaxed")
            tl.atomic_add(to + s01[:, None], grad_sample * (1 - fy) * fx, mask=i01[:, None] & all_, sem="relaxed")
            tl.atomic_add(to + s10[:, None], grad_sample * fy * (1 - fx), mask=i10[:, None] & all_, sem="relaxed")
            tl.atomic_add(to + s11[:, None], grad_sample * fy * fx, mask=i11[:, None] & all_, sem="relaxed")


@triton.jit
def _backward_weight(
    grad, image, offset, mask, partial, pixels, blocks,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    PACKS: tl.constexpr, PACK_IN: tl.constexpr, PACK_OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a partial weight gradient of one tap of one pack, summed over ``blocks`` consecutive tiles of pixels."""
    blocks_k: tl.constexpr = (PIECE + BLOCK_K - 1) // BLOCK_K
    blocks_n: tl.constexpr = (PACK_OUT + BLOCK_N - 1) // BLOCK_N
    pack = tl.program_id(1) // TAPS
    tap = tl.program_id(1) % TAPS
    piece = tl.program_id(2) // (blocks_k * blocks_n)
    inner = tl.program_id(2) // blocks_n % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    outputs = tl.program_id(2) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_k, valid_n = inner < PIECE, outputs < PACK_OUT
    inputs = piece * PIECE + inner
    offset_group = (pack * PIECES + piece) * OFFSET_GROUPS // (PACKS * PIECES)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for block in range(blocks):
        rows = (tl.program_id(0) * blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, row, column, valid = _pixel(rows, pixels, H_OUT, W_OUT)
        y0, x0, ly, lx, inside, factor, _ = _sample_at(
            offset, mask, n, row, column, valid, tap, offset_group, H, W, H_OUT, W_OUT, KERNEL_W, TAPS,
            STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_GROUPS, HAS_MASK,
        )  # fmt: skip
        v00, v01, v10, v11 = _gather(image, n, y0, x0, inside, pack * PACK_IN + inputs, valid_k, H, W, C)
        value = _bilinear(v00, v01, v10, v11, ly, lx)
        if HAS_MASK:
            value = value * factor[:, None]
        place = rows.to(tl.int64)[:, None] * C_OUT + pack * PACK_OUT + outputs[None]
        grad_out = tl.load(grad + place, mask=valid[:, None] & valid_n[None], other=0.0)
        total = tl.dot(tl.trans(value.to(grad_out.dtype)), grad_out, total, input_precision=PRECISION)
    place = ((tl.program_id(0) * PACKS + pack) * TAPS + tap).to(tl.int64) * (PACK_IN * PACK_OUT)
    place = place + inputs[:, None] * PACK_OUT + outputs[None]
    tl.store(partial + place, total, mask=valid_k[:, None] & valid_n[None])
