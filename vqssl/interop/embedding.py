"""Plain tables of codes: ``nn.Embedding`` and its like, which VQGAN, Chameleon, BEiT v2 and DAC have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqssl.checks import check_floating
from vqssl.codebook import EMACodebook
from vqssl.functional.metrics import MetricName
from vqssl.interop.codebook_formats import codebook_prefixes
from vqssl.interop.state_dicts import check_state, listed

__all__ = ["codebook_from_embedding"]

TABLES = ("embedding.weight", "codebook.weight")
"""How the names of tables end that are found without a prefix."""


def codebook_from_embedding(
    state: Mapping[str, Any], prefix: str | None = None, *, metric: MetricName = "euclidean", **options: Any
) -> EMACodebook:
    """Return an :class:`~vqssl.EMACodebook` with the codes of a plain table ``(K, D)``.

    Models whose codes an optimizer trains, or that save the codes alone, hold no counts or sums. Counts start at 1, as
    after :meth:`~vqssl.EMACodebook.set_codes_`, and training moves the codes by averages. Where codes are:

    ==========================  ======================================  ===============
    model                       ``prefix``                              ``metric``
    ==========================  ======================================  ===============
    Chameleon in transformers   ``model.vqmodel.quantize.embedding.``   ``"euclidean"``
    taming-transformers' VQGAN  ``quantize.embedding.``                 ``"euclidean"``
    BEiT v2's tokeniser         ``quantize.embedding.``                 ``"cosine"``
    DAC, level N                ``quantizer.quantizers.N.codebook.``    ``"cosine"``
    ==========================  ======================================  ===============

    By cosine, codes are scaled to length 1. DAC searches so too, but decodes the raw codes: take those from the state,
    ``state[prefix + "weight"][indices]``. Each of its levels has projections of its own, which stay in your model, so
    read its levels one by one.

    Args:
        state: of any module that holds the table.
        prefix: in front of ``weight``, dot included; None if there is only one table whose name ends in
            ``embedding.weight`` or ``codebook.weight``.
        metric: by which the model compares tokens with codes; a state does not say.
        **options: what :class:`~vqssl.EMACodebook` takes by name. Device and dtype are those of the state, float32 at
            least.

    Returns:
        The codebook ``(K, D)`` in training mode.

    Raises:
        TypeError: ``state`` is not a state dict, or the table is not floating.
        ValueError: no table, several and no ``prefix``, another shape than ``(K, D)``, codes that are not finite, or by
            cosine a code of zeros.

    >>> import torch
    >>> state = {"encoder.weight": torch.randn(4, 4), "quantize.embedding.weight": torch.randn(8, 4)}
    >>> codebook = codebook_from_embedding(state)
    >>> codebook.lookup(torch.tensor(5)).equal(state["quantize.embedding.weight"][5])
    True
    """
    check_state("state", state)
    name = _name(state, prefix)
    codes = state[name]
    check_floating(name, codes)
    if codes.ndim != 2 or not codes.numel():
        raise ValueError(
            f"{name} must be a table of codes (K, D), got shape {tuple(codes.shape)}: bring your codes into that "
            "shape, and write codebook.set_codes_(codes)"
        )
    options = {"device": codes.device, "dtype": codes.dtype, **options}
    codebook = EMACodebook(codebook_size=codes.shape[0], dim=codes.shape[1], metric=metric, **options)
    codebook.set_codes_(codes.detach())
    return codebook


def _name(state: Mapping[str, Any], prefix: str | None) -> str:
    tables = [name for name, value in state.items() if isinstance(value, Tensor) and _is_table(name)]
    if prefix is not None and f"{prefix}weight" in state:
        return f"{prefix}weight"
    if prefix is None and len(tables) == 1:
        return tables[0]
    received = "none" if prefix is None else repr(prefix)
    found = [name.removesuffix("weight") for name in tables]
    if found:
        raise ValueError(f"prefix must lead to one table of codes, got {received}; there are {listed(found)}: give one")
    if codebook_prefixes(state):
        raise ValueError(
            f"state must hold a plain table of codes, got counts too, at {listed(codebook_prefixes(state))}: write "
            "codebook_from_vector_quantize_pytorch where the flag is 'initted', codebook_from_encodec for 'inited'"
        )
    raise ValueError(
        f"state must hold a table of codes (K, D) whose name ends in {' or '.join(map(repr, TABLES))}, or give its "
        f"prefix, got {listed(state)}: if the codes are elsewhere, write codebook.set_codes_(codes)"
    )


def _is_table(name: str) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in TABLES)
