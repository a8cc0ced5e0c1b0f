"""The GPTQ paper's own algorithm in PyTorch, as the time to beat in benchmarks/solver.py; two forms of one result.

Written from algorithm 1 of Frantar et al. 2023. `original` has the layout and the operations of the authors'
implementation: the weight is (out, in), so that what goes one by one is a column; the inverse comes from
torch.cholesky_inverse; every column makes a column of quantized weights, of errors and of losses, and a rank-one update
of its block. Unlike theirs, both forms round scales to float16, and fit a group that begins within a block to weights
as updated there, as jgptq does. `tuned` is what a CPU likes better: the weight is (in, out), so that a column is a
contiguous row; the update is one operation in place; and the column loop has a number of threads of its own, for each
of its many small operations waits for all of them.
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


class Laps:
    """CPU seconds of the parts of a run."""

    def __init__(self):
        self.seconds = dict.fromkeys(("factorization", "column loop", "trailing products"), 0.0)
        self._clock = time.process_time()

    def end(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] += now - self._clock
        self._clock = now


def fit(w: torch.Tensor, bits: int, symmetric: bool, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Min/max scale and zero of one group, whose inputs lie along axis `inputs`; float16 scales, as they are stored."""
    low, high = w.amin(inputs).clamp(max=0), w.amax(inputs).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale.half().float(), zero


def damped(w: torch.Tensor, h: torch.Tensor, damp: float, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies, with dead inputs at zero and damping on the Hessian's diagonal."""
    w, h = w.clone(), h.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    w[(slice(None),) * inputs + (dead,)] = 0
    diagonal += damp * diagonal.mean()
    return w, h


def inverse_root(h: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def original(
    w: torch.Tensor,
    h: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    damp: float = 0.01,
    block_size: int = 128,
    threads: int = 2,
) -> Solution:
    """w (out, in) and h (in, in) float32; group_size a multiple or divisor of block_size. Changes neither."""
    torch.set_num_threads(threads)
    laps = Laps()
    w, h = damped(w, h, damp, inputs=1)
    upper = inverse_root(h)
    laps.end("factorization")

    quantized, codes, losses = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.uint8), torch.zeros_like(w)
    scales, zeros = [], []
    for start in range(0, w.shape[1], block_size):
        end = min(start + block_size, w.shape[1])
        block, u = w[:, start:end].clone(), upper[start:end, start:end]
        block_codes = torch.zeros(block.shape, dtype=torch.uint8)
        block_quantized, block_errors, block_losses = (torch.zeros_like(block) for _ in range(3))
        for j in range(end - start):
            if (start + j) % group_size == 0:
                group = torch.cat([block[:, j:], w[:, end:]], 1) if group_size > end - start - j else block[:, j:]
                scale, zero = fit(group[:, :group_size], bits, symmetric, inputs=1)
                scales.append(scale)
                zeros.append(zero)
            column, pivot = block[:, j], u[j, j]
            code = torch.clamp(torch.round(column / scale) + zero, 0, 2**bits - 1)
            value = scale * (code - zero)
            block_codes[:, j], block_quantized[:, j] = code, value
            block_losses[:, j] = (column - value) ** 2 / pivot**2
            error = (column - value) / pivot
            block[:, j:] -= error.unsqueeze(1).matmul(u[j, j:].unsqueeze(0))
            block_errors[:, j] = error
        quantized[:, start:end], losses[:, start:end] = block_quantized, block_losses
        codes[:, start:end] = block_codes
        laps.end("column loop")
        w[:, end:] -= block_errors.matmul(upper[start:end, end:])
        laps.end("trailing products")
    return Solution(codes.T, torch.stack(scales), torch.stack(zeros), losses.sum(), laps.seconds)


def tuned(
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
) -> Solution:
    """As `original`, but for w (in, out)."""
    torch.set_num_threads(threads)
    laps = Laps()
    w, h = damped(w, h, damp, inputs=0)
    upper = inverse_root(h)
    laps.end("factorization")

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
                scale, zero = fit(group[:group_size], bits, symmetric, inputs=0)
                scales.append(scale)
                zeros.append(zero)
            code = torch.clamp(torch.round(block[j] / scale) + zero, 0, 2**bits - 1)
            errors[j] = (block[j] - scale * (code - zero)) / u[j, j]
            loss += torch.dot(errors[j], errors[j])
            codes[start + j] = code
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        laps.end("column loop")
        torch.set_num_threads(threads)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        laps.end("trailing products")
    return Solution(codes, torch.stack(scales), torch.stack(zeros), loss, laps.seconds)
