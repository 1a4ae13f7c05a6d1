"""The rule of the search by brute force in float64, written without a line of the kernels'."""

import math

import torch

from vqssl import kernels


def brute_scores(x, codes, metric):
    """Return `(N, K)` float64, higher is nearer; a code that may not be chosen has -inf."""
    x, codes = x.double(), codes.double()
    usable = torch.isfinite(codes).all(-1)
    columns = []
    for code in codes:
        if metric == "euclidean":
            columns.append(-((x - code) ** 2).sum(-1))
        else:
            length = math.sqrt(float((code * code).sum()))
            columns.append((x * (code / length if length > 0 else code)).sum(-1))
    scores = torch.stack(columns, 1)
    return torch.where(usable, scores, -torch.inf)


def brute_force(x, codes, metric="euclidean"):
    """Return the lowest index of the best score, -1 if there is none."""
    scores = brute_scores(x, codes, metric)
    found = []
    for row, scored in zip(x, scores, strict=True):
        if not torch.isfinite(row).all() or not torch.isfinite(codes).all(-1).any():
            found.append(-1)
            continue
        best = max(scored.tolist())
        found.append(scored.tolist().index(best))
    return torch.tensor(found, dtype=torch.int64)


def check(x, codes, metric="euclidean"):
    """Assert that the operator, the reference and brute force agree to the index; return the indices."""
    found = kernels.nearest_codeword(x, codes, metric)
    assert found.dtype == torch.int64
    assert found.shape == x.shape[:1]
    expected = brute_force(x, codes, metric)
    reference = torch.cat([kernels.nearest_reference(part, codes, metric) for part in x.split(64)])
    # Two float64 sums in another order may differ in the last bit: only such a tie excuses another answer.
    for answer in (found, reference):
        differs = (answer != expected).nonzero().flatten()
        if len(differs):
            scores = brute_scores(x[differs], codes, metric)
            a = scores.gather(1, answer[differs, None])
            b = scores.gather(1, expected[differs, None])
            size = (
                x[differs].double().square().sum(-1, keepdim=True) + codes.double().nan_to_num(0, 0, 0).square().max()
            )
            assert ((b - a).abs() <= 1e-15 * size).all(), (differs, answer[differs], expected[differs])
    assert torch.equal(found, reference)
    return found
