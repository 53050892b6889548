"""What runs on the GPU for :mod:`anybatch.kernels.triton_norm` and :mod:`anybatch.kernels.triton_responses`.

    moments          tile by tile: mean_b = 1/n sum y, M2_b = sum (y - mean_b)^2, joined by Chan's rule
                     M2 += M2_b + (mean_b - mean)^2 count n / (count + n);  the parts by core's ``pool``
    normalise        z = a (y - mean) + bias,  a = weight / sqrt(var + eps),  out = z or max(z, 0)
    reduce           sum g, sum g (y - mean) / sqrt(var + eps),  g zero where z <= 0 under a ReLU
    input_gradient   dy = a g + slope (y - centre) + offset
    responses        of a row W_c of weights:  <P_g(c), W_c>, <D_c, W_c>

y is (N, C, *) as N * S rows of C channels with any strides; a program takes a tile of R rows by C channels, or as many
such tiles below one another as its part of a sum has. Only what every Triton has is used, and nothing that its
interpreter lacks, so the tests run these very kernels without a GPU. Reads and writes: the table in passes.py, z being
computed again where g is masked, and triton_responses.py. Not measured on a GPU yet.
"""

import triton
import triton.language as tl

__all__ = [
    "input_gradient_tile",
    "join_moments",
    "moments_of_parts",
    "normalise_tile",
    "reduce_parts",
    "row_responses",
]


@triton.jit
def _tile(r, end, c, channels, positions, by_n, by_c, by_s):
    """Offsets and mask of rows r by channels c."""
    offsets = (r // positions * by_n + r % positions * by_s)[:, None] + (c * by_c)[None, :]
    return offsets, (r < end)[:, None] & (c < channels)[None, :]


@triton.jit
def _affine(mean, var, weight, bias, eps, c, known):
    """Mean, 1 / sqrt(var + eps), a and bias of channels c, each a row."""
    inverse = 1.0 / tl.sqrt(tl.load(var + c, mask=known, other=1.0) + eps)
    a = inverse
    if weight is not None:
        a = inverse * tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    b = tl.zeros_like(inverse)
    if bias is not None:
        b = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    return tl.load(mean + c, mask=known, other=0.0)[None, :], inverse[None, :], a[None, :], b[None, :]


@triton.jit
def _masked(g, values, mean, a, b, like):
    """g, zero where the ReLU's output is: z is rounded as the forward rounded it."""
    z = (a * (values - mean) + b).to(like.dtype.element_ty)
    return tl.where(z <= 0, 0.0, g)


@triton.jit
def moments_of_parts(
    y, means, variances, rows, channels, positions, by_n, by_c, by_s, part_rows, R: tl.constexpr, C: tl.constexpr
):
    """Mean and variance of one part of the rows."""
    blocks = tl.cdiv(channels, C)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    end = tl.minimum(part * part_rows + part_rows, rows)
    mean = tl.zeros([C], tl.float32)
    squares = tl.zeros([C], tl.float32)
    for first in range(part * part_rows, end, R):
        offsets, known = _tile(first + tl.arange(0, R), end, c, channels, positions, by_n, by_c, by_s)
        values = tl.load(y + offsets, mask=known, other=0.0).to(tl.float32)
        before = (first - part * part_rows) * 1.0
        new = tl.minimum(end - first, R) * 1.0
        tile_mean = tl.sum(values, 0) / new
        apart = tl.where(known, values - tile_mean[None, :], 0.0)
        between = tile_mean - mean
        mean += between * (new / (before + new))
        squares += tl.sum(apart * apart, 0) + between * between * (before * (new / (before + new)))
    size = (end - part * part_rows) * 1.0
    tl.store(means + part * channels + c, mean, mask=c < channels)
    tl.store(variances + part * channels + c, squares / size, mask=c < channels)


@triton.jit
def join_moments(means, variances, mean, var, rows, channels, part_rows, parts, P: tl.constexpr, C: tl.constexpr):
    """The equations of core's ``pool`` with shares in proportion to the parts' rows."""
    p = tl.arange(0, P)
    c = tl.program_id(0) * C + tl.arange(0, C)
    known = (p < parts)[:, None] & (c < channels)[None, :]
    sizes = tl.minimum(rows - p * part_rows, part_rows)
    shares = (tl.where(p < parts, sizes, 0) * 1.0 / rows)[:, None]
    of_parts = tl.load(means + p[:, None] * channels + c[None, :], mask=known, other=0.0)
    within = tl.load(variances + p[:, None] * channels + c[None, :], mask=known, other=0.0)
    whole = tl.sum(shares * of_parts, 0)
    between = of_parts - whole[None, :]
    tl.store(mean + c, whole, mask=c < channels)
    tl.store(var + c, tl.sum(shares * (within + between * between), 0), mask=c < channels)


@triton.jit
def normalise_tile(
    y, out, mean, var, weight, bias, eps, rows, channels, positions, by_n, by_c, by_s,
    RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    blocks = tl.cdiv(channels, C)
    r = tl.program_id(0) // blocks * R + tl.arange(0, R)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    offsets, known = _tile(r, rows, c, channels, positions, by_n, by_c, by_s)
    at, _, a, b = _affine(mean, var, weight, bias, eps, c, c < channels)
    z = a * (tl.load(y + offsets, mask=known, other=0.0).to(tl.float32) - at) + b
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # not maximum: a NaN stays
    tl.store(out + offsets, z, mask=known)


@triton.jit
def reduce_parts(
    g, y, sums, mean, var, weight, bias, eps, rows, channels, positions, by_n, by_c, by_s, part_rows,
    RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Both sums over one part of the rows: sums is (parts, 2, channels)."""
    blocks = tl.cdiv(channels, C)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    end = tl.minimum(part * part_rows + part_rows, rows)
    at, inverse, a, b = _affine(mean, var, weight, bias, eps, c, c < channels)
    sum_g = tl.zeros([C], tl.float32)
    sum_g_y_hat = tl.zeros([C], tl.float32)
    for first in range(part * part_rows, end, R):
        offsets, known = _tile(first + tl.arange(0, R), end, c, channels, positions, by_n, by_c, by_s)
        values = tl.load(y + offsets, mask=known, other=0.0).to(tl.float32)
        grads = tl.load(g + offsets, mask=known, other=0.0).to(tl.float32)
        if RELU:
            grads = _masked(grads, values, at, a, b, y)
        sum_g += tl.sum(grads, 0)
        sum_g_y_hat += tl.sum(grads * ((values - at) * inverse), 0)
    tl.store(sums + part * 2 * channels + c, sum_g, mask=c < channels)
    tl.store(sums + part * 2 * channels + channels + c, sum_g_y_hat, mask=c < channels)


@triton.jit
def input_gradient_tile(
    g, y, grad, mean, var, weight, bias, eps, centre, slope, offset,
    rows, channels, positions, by_n, by_c, by_s,
    SCALED: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of dy; without SCALED a is one."""
    blocks = tl.cdiv(channels, C)
    r = tl.program_id(0) // blocks * R + tl.arange(0, R)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    offsets, known = _tile(r, rows, c, channels, positions, by_n, by_c, by_s)
    values = tl.load(y + offsets, mask=known, other=0.0).to(tl.float32)
    grads = tl.load(g + offsets, mask=known, other=0.0).to(tl.float32)
    if SCALED:
        at, _, a, b = _affine(mean, var, weight, bias, eps, c, c < channels)
        if RELU:
            grads = _masked(grads, values, at, a, b, y)
        grads = a * grads
    middle = tl.load(centre + c, mask=c < channels, other=0.0)[None, :]
    rise = tl.load(slope + c, mask=c < channels, other=0.0)[None, :]
    shift = tl.load(offset + c, mask=c < channels, other=0.0)[None, :]
    tl.store(grad + offsets, grads + (rise * (values - middle) + shift), mask=known)


@triton.jit
def row_responses(
    out, layers, layer_of_row,
    FIELDS: tl.constexpr, WEIGHT: tl.constexpr, COVARIANCE: tl.constexpr, PATCH: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One row; a layer in the table: addresses of W, D and P, first row, K, rows a group, strides of W, D and P."""
    at = tl.program_id(0)
    layer = layers + tl.load(layer_of_row + at) * FIELDS
    row = at - tl.load(layer + 3)
    width = tl.load(layer + 4)
    weight = tl.load(layer).to(tl.pointer_type(WEIGHT)) + row * tl.load(layer + 6)
    covariance = tl.load(layer + 1).to(tl.pointer_type(COVARIANCE)) + row * tl.load(layer + 7)
    patch = tl.load(layer + 2).to(tl.pointer_type(PATCH)) + row // tl.load(layer + 5) * tl.load(layer + 8)
    by_patch = tl.zeros([K], tl.float32)
    by_covariance = tl.zeros([K], tl.float32)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        w = tl.load(weight + k, mask=k < width, other=0.0).to(tl.float32)
        by_patch += w * tl.load(patch + k, mask=k < width, other=0.0).to(tl.float32)
        by_covariance += w * tl.load(covariance + k, mask=k < width, other=0.0).to(tl.float32)
    tl.store(out + at * 2, tl.sum(by_patch, 0))
    tl.store(out + at * 2 + 1, tl.sum(by_covariance, 0))
