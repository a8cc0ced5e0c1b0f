"""The GPTQ paper's own algorithm in plain PyTorch, as the time to beat in benchmarks/solver.py.

Written from algorithm 1 of Frantar et al. 2023 and tuned for a CPU: the weight is held (in, out), so that the column
of the paper is a contiguous row; the update inside a block is one rank-one product in place; denormals are flushed;
the inverse may come from two triangular solves, which take half the time of torch.cholesky_inverse; and the column
loop may have its own number of threads, for on a busy machine each of its many small operations waits for a barrier.
"""

import time
from typing import NamedTuple

import torch


class Solution(NamedTuple):
    codes: torch.Tensor  # (in, out)
    scales: torch.Tensor  # (groups, out)
    zeros: torch.Tensor
    loss: torch.Tensor
    cpu_seconds: dict[str, float]


def fit(w: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Min/max scale and zero of one (group, out) block, the scale rounded to float16 as it will be stored."""
    low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale.half().float(), zero


def gptq(
    w: torch.Tensor,
    h: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    damp: float = 0.01,
    block_size: int = 128,
    threads: int = 2,
    loop_threads: int = 1,
    cholesky_inverse: bool = False,
) -> Solution:
    """w (in, out) and h (in, in) float32; group_size a multiple or divisor of block_size. Changes neither."""
    torch.set_flush_denormal(True)
    seconds = dict.fromkeys(("factorization", "column loop", "trailing products"), 0.0)
    clock = time.process_time()

    def lap(part):
        nonlocal clock
        now = time.process_time()
        seconds[part] += now - clock
        clock = now

    w, h = w.clone(), h.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    w[dead] = 0
    diagonal += damp * diagonal.mean()
    torch.set_num_threads(threads)
    lower = torch.linalg.cholesky(h)
    inverse = torch.cholesky_inverse(lower) if cholesky_inverse else torch.cholesky_solve(torch.eye(len(h)), lower)
    upper = torch.linalg.cholesky(inverse, upper=True)
    lap("factorization")

    codes = torch.empty(w.shape, dtype=torch.uint8)
    scales, zeros, loss = [], [], torch.zeros(())
    for start in range(0, len(w), block_size):
        end = min(start + block_size, len(w))
        block, u = w[start:end].clone(), upper[start:end, start:end].contiguous()
        errors = torch.empty_like(block)
        torch.set_num_threads(loop_threads)
        for j in range(end - start):
            if (start + j) % group_size == 0:
                # What lies beyond this block is as the trailing products left it, as in the original.
                group = torch.cat([block[j:], w[end:]])[:group_size] if group_size > end - start - j else block[j:]
                scale, zero = fit(group[:group_size], bits, symmetric)
                scales.append(scale)
                zeros.append(zero)
            code = torch.clamp(torch.round(block[j] / scale) + zero, 0, 2**bits - 1)
            errors[j] = (block[j] - scale * (code - zero)) / u[j, j]
            loss += torch.dot(errors[j], errors[j])
            codes[start + j] = code
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        lap("column loop")
        torch.set_num_threads(threads)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        lap("trailing products")
    return Solution(codes, torch.stack(scales), torch.stack(zeros), loss, seconds)
