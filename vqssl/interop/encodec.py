"""Codebooks of encodec: Meta's package and audiocraft, and transformers' ``EncodecModel``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqssl.codebook import EMACodebook
from vqssl.initialization import KMeansInit
from vqssl.interop.codebook_formats import CodebookFormat, build_codebook
from vqssl.interop.state_dicts import check_state

__all__ = ["codebook_from_encodec", "codebook_to_encodec"]

FORMAT = CodebookFormat(
    library="encodec",
    flag="inited",
    heads=False,
    cure=(
        "give the state of encodec's or transformers' EncodecModel, or of a quantiser in it; "
        "codebook_from_vector_quantize_pytorch where the flag is 'initted', "
        "codebook_from_mimi where sums are 'embed_sum'"
    ),
)


def codebook_from_encodec(state: Mapping[str, Any], prefix: str | None = None, **options: Any) -> EMACodebook:
    """Return an :class:`~vqssl.EMACodebook` with the codes, counts and sums of one codebook of encodec.

    Every bit is kept. Codebooks are at ``quantizer.vq.layers.N._codebook.`` in Meta's model, at
    ``quantizer.layers.N.codebook.`` in transformers'; :func:`codebook_prefixes` lists them. Each layer quantises the
    residual of the layers before it.

    Options that you leave out have the defaults of ``EuclideanCodebook``: ``decay=0.99``, ``eps=1e-5``,
    ``commitment_weight=1.0``, and k-means of 50 iterations if it was not initialised yet (tokens
    themselves, where the first batch has fewer than codes). A training step is then the
    same step. Note:

    - There is no revival. Encodec's has no effect: ``threshold_ema_dead_code`` replaces codes before the moving
      average of the same step, which overwrites them from sums and counts that were not replaced. Give
      ``revival=vqssl.BatchRevival()`` for one that lasts.
    - Encodec's k-means writes means to ``embed_avg`` where sums belong: with counts N, the first steps after it pull
      used codes towards zero. A state from that time keeps the error; ``codebook.set_codes_(codebook.embed)`` mends it.
    - Encodec does not sum statistics over ranks; ours does, in any process group.

    Args:
        state: of an encodec model, of a quantiser in it, or of one ``EuclideanCodebook``.
        prefix: where the codebook is; None if there is only one.
        **options: what :class:`~vqssl.EMACodebook` takes by name, but for ``metric``, which is euclidean. Device and
            dtype are those of the state, float32 at least.

    Returns:
        The codebook ``(K, D)`` in training mode, ``initialized`` as ``inited`` was; its generator starts again at
        ``seed``.

    Raises:
        TypeError: ``state`` is not a state dict, or a tensor is not floating.
        ValueError: no codebook, several and no ``prefix``, other names than ``embed``, ``embed_avg``,
            ``cluster_size``, ``inited``, shapes that do not belong together, or values that are not finite.

    >>> import torch
    >>> layer = {"embed": torch.randn(8, 4), "cluster_size": torch.full((8,), 3.0), "inited": torch.tensor([1.0])}
    >>> layer["embed_avg"] = 3 * layer["embed"]
    >>> state = {f"quantizer.layers.{n}.codebook.{name}": value for n in range(2) for name, value in layer.items()}
    >>> codebook_from_encodec(state, "quantizer.layers.1.codebook.").cluster_size[0].item()
    3.0
    """
    check_state("state", state)
    (chosen,) = FORMAT.read(state, prefix, "euclidean")
    defaults = {
        "decay": 0.99,
        "eps": 1e-5,
        "commitment_weight": 1.0,
        "revival": None,
        "initialization": KMeansInit(iterations=50, few_tokens="sample"),
    }
    return build_codebook(chosen, "euclidean", {**defaults, **options})


def codebook_to_encodec(
    codebook: EMACodebook, prefix: str | None = None, *, like: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return the state of a euclidean codebook as encodec holds it.

    What :func:`codebook_from_encodec` read comes back bit for bit; give ``like`` if the state had another dtype than
    float32 or float64. Their format does not hold our generator, nor what is not in our state either: decay, eps,
    revival.

    Args:
        codebook: one.
        prefix: in front of the names; None is that of the only codebook in ``like``, or else ``"_codebook."``.
        like: the state dict of the module that is to load the result; dtypes follow it.

    Returns:
        ``embed`` and ``embed_avg`` ``(K, D)``, ``cluster_size`` ``(K,)``, ``inited`` ``(1,)`` a float, all copies.
        With ``like``: all that is in it, these replaced.

    Raises:
        TypeError: ``codebook`` is not an EMACodebook, or ``like`` not a state dict.
        ValueError: the metric is cosine, which encodec has not; no room in ``like``, or several codebooks and no
            ``prefix``; values beyond the dtype of ``like``.

    >>> import vqssl
    >>> state = codebook_to_encodec(vqssl.EMACodebook(codebook_size=8, dim=4))
    >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
    {'_codebook.inited': (1,), '_codebook.cluster_size': (8,), '_codebook.embed_avg': (8, 4), '_codebook.embed': (8, 4)}
    """
    if isinstance(codebook, EMACodebook) and codebook.metric != "euclidean":
        raise ValueError(
            f"codebook must have metric 'euclidean', the only one that encodec has, got {codebook.metric!r}: write it "
            "for vector-quantize-pytorch instead"
        )
    return FORMAT.write([codebook], prefix, like)
