"""Codebooks of vector-quantize-pytorch (PyPI, by Phil Wang): ``VectorQuantize``, ``ResidualVQ`` and what holds them."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vqssl.codebook import EMACodebook
from vqssl.functional.metrics import MetricName
from vqssl.initialization import KMeansInit
from vqssl.interop.codebook_formats import CodebookFormat, build_codebook
from vqssl.interop.state_dicts import check_state

__all__ = ["codebook_from_vector_quantize_pytorch", "codebook_to_vector_quantize_pytorch"]

FORMAT = CodebookFormat(
    library="vector-quantize-pytorch",
    flag="initted",
    heads=True,
    cure=(
        "give the state of a VectorQuantize without affine_param and vq_bridge; metric='cosine' where embed_avg is "
        "missing since the release was old; codebook_from_encodec where the flag is 'inited'"
    ),
)


def codebook_from_vector_quantize_pytorch(
    state: Mapping[str, Any],
    prefix: str | None = None,
    *,
    head: int | None = None,
    metric: MetricName | None = None,
    **options: Any,
) -> EMACodebook:
    """Return an :class:`~vqssl.EMACodebook` with the codes, counts and sums of a codebook of vector-quantize-pytorch.

    Every bit is kept, and training continues by the same rule in the same order. Only tokens that are equally near to
    two codes in float32 may differ, since our search is exact. Formats read: those of releases 0.3 to 1.32, with or
    without a heads axis, ``initted`` a bool or a float. Cosine codebooks of releases without ``embed_avg`` get counts
    times codes; their rule, an average of unit means, differs slightly from ours. Projections beside the codebook are
    ``nn.Linear`` and stay in your model; the codebook quantises their output.

    A state says neither how it was trained nor by what distance. Options that you leave out have the defaults of
    ``VectorQuantize``: ``decay=0.8``, ``eps=1e-5``, ``commitment_weight=1.0``, no revival,
    ``estimator="rotation"`` (``"straight_through"`` where D is 1, as there), and k-means of 10 iterations if it was
    not initialised yet. What behaves differently:

    - ``threshold_ema_dead_code=t`` counts tokens a step; our ``BatchRevival`` takes a fraction of the fair share, t K
      / tokens a step.
    - A codebook that was not initialised quantises by the codes of the state in eval mode, and waits for training
      mode; theirs runs k-means on the first batch in any mode.
    - A cosine code that has had no token for some hundred steps shrinks to nothing there, since quotients shorter
      than 1e-6 are no longer normalised; ours stays at length 1 and can be chosen again.
    - With a mask and the cosine metric, their commitment measures from the token as it came, ours from the token at
      length 1, as without a mask.
    - With ``learnable_codebook=True`` or ``directional_reparam=True`` an optimizer moved ``embed``, and ``embed_avg``
      does not match it: freeze the result, or call ``codebook.set_codes_(codebook.embed)`` before training.

    Args:
        state: of a ``VectorQuantize``, of its ``_codebook``, or of any module around them.
        prefix: where the codebook is, such as ``"layers.0._codebook."``; None if there is only one.
        head: index of the head, if ``separate_codebook_per_head`` gave each its own codes, ``embed`` ``(h, K, D)``.
            With one codebook for all heads leave it out, and give the codebook tokens ``(B, N, h, D)``.
        metric: ``"cosine"`` for ``use_cosine_sim=True``. None (default) is ``"euclidean"``, with a warning where all
            codes have length 1.
        **options: what :class:`~vqssl.EMACodebook` takes by name. Device and dtype are those of the state, float32 at
            least.

    Returns:
        The codebook ``(K, D)`` in training mode, ``initialized`` as ``initted`` was; its generator starts again at
        ``seed``.

    Raises:
        TypeError: ``state`` is not a state dict, or a tensor is not floating.
        ValueError: no codebook, several and no ``prefix`` or ``head``, names beyond the four (``affine_param``,
            ``vq_bridge``), shapes that do not belong together, values that are not finite, lengths that no cosine
            codebook has, or a level of a residual quantiser with ``implicit_neural_codebook=True`` after the first.

    Warns:
        UserWarning: ``metric`` was left out, and all codes have length 1.

    >>> import torch
    >>> embed = torch.randn(2, 8, 4)  # two heads
    >>> state = {"_codebook.embed": embed, "_codebook.embed_avg": embed, "_codebook.cluster_size": torch.ones(2, 8)}
    >>> state["_codebook.initted"] = torch.tensor(True)
    >>> codebook = codebook_from_vector_quantize_pytorch(state, head=1)
    >>> torch.equal(codebook.embed, embed[1])
    True
    """
    check_state("state", state)
    _refuse_implicit_neural_codebook(state, FORMAT.locate(state, prefix))
    heads = FORMAT.read(state, prefix, metric or "euclidean")
    if head is None and len(heads) > 1:
        raise ValueError(
            f"head must name one of {len(heads)} heads, each of which has codes of its own, got none: write head=0, or "
            f"[codebook_from_vector_quantize_pytorch(state, head=h) for h in range({len(heads)})]"
        )
    if head is not None and (isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < len(heads)):
        raise ValueError(f"head must be from 0 to {len(heads) - 1}, got {head!r}: heads count from 0")
    chosen = heads[head or 0]
    if metric is None:
        _warn_of_cosine(chosen.embed)
    defaults = {
        "decay": 0.8,
        "eps": 1e-5,
        "commitment_weight": 1.0,
        "revival": None,
        "estimator": "rotation" if chosen.embed.shape[-1] > 1 else "straight_through",
        "initialization": KMeansInit(),
    }
    return build_codebook(chosen, metric or "euclidean", {**defaults, **options})


def _refuse_implicit_neural_codebook(state: Mapping[str, Any], prefix: str) -> None:
    """Raise for a level whose codes a network changes with each token (QINCo, arXiv 2401.14732)."""
    found = re.fullmatch(r"(.*?)layers\.(\d+)\._codebook\.", prefix)
    if found and int(found[2]) > 0 and any(name.startswith(f"{found[1]}mlps.") for name in state):
        raise ValueError(
            f"a codebook must have the same codes for every token, but {prefix!r} belongs to a ResidualVQ with "
            "implicit_neural_codebook=True, whose networks change the codes with each token: keep their module for it"
        )


def _warn_of_cosine(embed: Tensor) -> None:
    lengths = embed.float().norm(dim=-1)
    if embed.shape[-1] > 1 and len(lengths) > 1 and ((lengths - 1).abs() < 1e-4).all():
        warnings.warn(
            "all codes of this state have length 1, as those of use_cosine_sim=True, but metric was left out and is "
            "'euclidean': write metric='cosine', or metric='euclidean' if it is so",
            stacklevel=3,
        )


def codebook_to_vector_quantize_pytorch(
    codebook: EMACodebook | Sequence[EMACodebook], prefix: str | None = None, *, like: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return the state of one or several codebooks as ``VectorQuantize`` holds it.

    What :func:`codebook_from_vector_quantize_pytorch` read comes back bit for bit, given ``like``. Their format holds
    codes, counts and sums. It does not hold our generator, so revivals draw other tokens after a round trip, nor what
    is not in our state either: metric, decay, eps, revival. Build their module with ``use_cosine_sim``, ``decay`` and
    ``eps`` equal to ours.

    Args:
        codebook: one, or a sequence with one for each head.
        prefix: in front of the names; None is that of the only codebook in ``like``, or else ``"_codebook."``.
        like: the state dict of the module that is to load the result. Shapes and dtypes follow it, so that releases
            without a heads axis, or with ``initted`` of one float, load it too; values are rounded where its dtype is
            narrower. None writes the format of release 1.32.

    Returns:
        ``embed`` and ``embed_avg`` ``(h, K, D)``, ``cluster_size`` ``(h, K)``, ``initted`` a bool, all copies. With
        ``like``: all that is in it, these replaced.

    Raises:
        TypeError: ``codebook`` is not an EMACodebook, or ``like`` not a state dict.
        ValueError: heads of unequal size, metric, dtype, device or initialisation; no room in ``like``, or several
            codebooks and no ``prefix``; values beyond the dtype of ``like``.

    >>> import vqssl
    >>> codebooks = [vqssl.EMACodebook(codebook_size=8, dim=4, seed=seed) for seed in range(2)]
    >>> state = codebook_to_vector_quantize_pytorch(codebooks)
    >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
    {'_codebook.initted': (), '_codebook.cluster_size': (2, 8), '_codebook.embed_avg': (2, 8, 4),
     '_codebook.embed': (2, 8, 4)}
    """
    codebooks = [codebook] if isinstance(codebook, EMACodebook) or not isinstance(codebook, Sequence) else codebook
    return FORMAT.write(codebooks, prefix, like)
