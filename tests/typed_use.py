"""What a type checker accepts and refuses in a user's file.

`.ci/run lint` checks this file with the options of `mypy --strict`. Each `type: ignore` names an error that mypy must
report, because mypy also reports an ignore without an error. test_types.py runs the functions.
"""

# The options of --strict that pyproject.toml relaxes for the other tests.
# mypy: disallow-untyped-calls, disallow-untyped-decorators, disallow-untyped-defs, disallow-incomplete-defs
# mypy: disallow-any-generics, disallow-subclassing-any, check-untyped-defs, warn-return-any, untyped-calls-exclude=

from typing import Literal

import torch
from torch import Tensor

from vqssl import (
    BagTarget,
    ChannelsFirst,
    CodebookFit,
    CodebookUsage,
    CodePrediction,
    EMACodebook,
    MultiCodeQuantized,
    MultiScaleQuantized,
    MultiScaleQuantizer,
    ProductQuantizer,
    Quantized,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    fit_codebook,
    functional,
)


def freeze_keeps_the_type_of_a_codebook() -> Quantized:
    return EMACodebook(codebook_size=8, dim=4).freeze().quantize(torch.ones(2, 4))


def freeze_keeps_the_type_of_a_multi_scale_quantizer() -> int:
    return MultiScaleQuantizer([3], codebook_size=8, dim=4).freeze().num_scales


def module_calls_are_typed() -> tuple[Quantized, MultiScaleQuantized]:
    codebook = EMACodebook(codebook_size=8, dim=4)
    quantizer = MultiScaleQuantizer([4], codebook_size=8, dim=4)
    return codebook(torch.ones(2, 4)), quantizer([torch.ones(2, 4, 3)])


def results_unpack() -> tuple[Tensor, Tensor, Tensor]:
    quantized, indices, loss = EMACodebook(codebook_size=8, dim=4)(torch.ones(2, 4))
    return quantized, indices, loss


def a_name_may_come_from_a_typed_variable() -> EMACodebook:
    metric: Literal["euclidean", "cosine"] = "cosine"
    return EMACodebook(codebook_size=8, dim=4, metric=metric)


def options_of_codebooks_are_known() -> MultiScaleQuantizer:
    return MultiScaleQuantizer([3, 5], codebook_size=[8, 16], dim=4, metric="cosine", decay=0.9, revival=None)


def residual_levels_are_typed() -> tuple[MultiCodeQuantized, Tensor]:
    quantizer = ResidualQuantizer(codebook_size=[8, 4], dim=4, num_levels=2, revival=None)
    out = quantizer(torch.ones(2, 4))
    return out, quantizer.freeze().lookup(out.indices[..., :1])


def groups_are_typed() -> MultiCodeQuantized:
    return ProductQuantizer(codebook_size=8, dim=4, num_groups=2, metric="cosine")(torch.ones(2, 4))


def random_targets_are_typed() -> Tensor:
    return RandomProjectionQuantizer(in_dim=4, codebook_size=8, dim=2, norm_input="sequence")(torch.ones(2, 3, 4))


def maps_are_typed() -> tuple[Quantized, MultiCodeQuantized]:
    maps = torch.ones(2, 4, 3, 3)
    one = ChannelsFirst(EMACodebook(codebook_size=8, dim=4))
    several = ChannelsFirst(ResidualQuantizer(codebook_size=8, dim=4, num_levels=2))
    return one(maps), several(maps)


def identity_projection_has_a_name() -> MultiScaleQuantizer:
    return MultiScaleQuantizer([4], codebook_size=8, dim=4, projection="identity")


def a_fit_is_typed() -> tuple[float, ...]:
    return fit_codebook(EMACodebook(codebook_size=2, dim=4), [torch.eye(4)], passes=1).errors


def code_prediction_is_typed() -> tuple[Tensor, tuple[Tensor, ...]]:
    prediction = CodePrediction(4, [8], target=BagTarget(reduction="max"))
    return prediction(torch.ones(2, 4), [torch.zeros(2, 3, dtype=torch.int64)])


def a_client_uses_all_quantizers() -> dict[str, float]:
    """Train by every quantiser that the library has, as a user's strictly typed module would."""
    maps, features = torch.randn(4, 16, 8, 8), torch.randn(4, 50, 16, requires_grad=True)
    encoder, optimizer = torch.nn.Linear(16, 16), torch.optim.SGD([features], lr=0.1)
    codebook = EMACodebook(codebook_size=8, dim=16, metric="cosine", estimator="rotation")
    residual = ResidualQuantizer(codebook_size=8, dim=16, num_levels=3, level_dropout=0.5)
    groups = ProductQuantizer(codebook_size=[8, 4], dim=16, num_groups=2, decay=0.9)
    several: tuple[ResidualQuantizer, ProductQuantizer] = (residual, groups)
    scales = MultiScaleQuantizer([16], codebook_size=8, dim=16, projection="identity")
    prediction = CodePrediction([16], scales, target="place", head="linear")
    random = RandomProjectionQuantizer(in_dim=16, codebook_size=8, dim=4, num_codebooks=2)
    target: Tensor = random(features)
    shares: Tensor = functional.sinkhorn(features @ codebook.embed.mT)
    one: Quantized = codebook(encoder(features))
    losses: dict[str, Tensor] = {"codebook": one.commitment_loss}
    for quantizer in several:
        out = quantizer(features, mask=torch.rand(4, 50) < 0.9)
        losses[type(quantizer).__name__] = out.quantized.square().mean() + sum(out.commitment_losses)
        decoded: Tensor = quantizer.lookup(out.indices)
        assert decoded.shape == features.shape
    pyramid: MultiScaleQuantized = scales([maps])
    losses["places"] = prediction([maps], pyramid).total
    by_map: MultiCodeQuantized = ChannelsFirst(residual).quantize(maps)
    losses["map"] = by_map.commitment_loss
    losses["balance"] = functional.code_cross_entropy(features @ codebook.embed.mT, shares)
    losses["random"] = functional.code_cross_entropy(features.reshape(4, 50, 2, 8), target)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    usages: list[CodebookUsage] = [codebook.usage(), *residual.usage(), *groups.usage(), *scales.usage()]
    found: CodebookFit = fit_codebook(EMACodebook(codebook_size=4, dim=16), [features.detach()], passes=2)
    return {"error": found.errors[-1], "perplexity": min(usage.perplexity.item() for usage in usages)}


def misspelt_target() -> None:
    CodePrediction(4, [8], target="bags")  # type: ignore[arg-type]


def misspelt_name() -> None:
    EMACodebook(codebook_size=8, dim=4, metric="Euclidean")  # type: ignore[arg-type]


def misspelt_name_for_all_scales() -> None:
    MultiScaleQuantizer([3], codebook_size=8, dim=4, metric="Euclidean")  # type: ignore[arg-type]


def misspelt_keyword_for_all_levels() -> None:
    ResidualQuantizer(codebook_size=8, dim=4, num_levels=2, metrc="cosine")  # type: ignore[call-arg]


def misspelt_input_norm() -> None:
    RandomProjectionQuantizer(in_dim=4, codebook_size=8, dim=2, norm_input="layer")  # type: ignore[arg-type]


def misspelt_projection() -> None:
    MultiScaleQuantizer([4], codebook_size=8, dim=4, projection="none")  # type: ignore[arg-type]


def misspelt_keyword() -> None:
    EMACodebook(codebook_size=8, dim=4, metrc="cosine")  # type: ignore[call-arg]


def misspelt_keyword_for_all_scales() -> None:
    MultiScaleQuantizer([3], codebook_size=8, dim=4, metrc="cosine")  # type: ignore[call-arg]


def positional_sizes() -> None:
    EMACodebook(8, 4)  # type: ignore[call-arg]


def positional_sizes_for_all_scales() -> None:
    MultiScaleQuantizer([3], 8, dim=4)  # type: ignore[call-arg]


ACCEPTED = (
    freeze_keeps_the_type_of_a_codebook,
    freeze_keeps_the_type_of_a_multi_scale_quantizer,
    module_calls_are_typed,
    results_unpack,
    a_name_may_come_from_a_typed_variable,
    options_of_codebooks_are_known,
    residual_levels_are_typed,
    groups_are_typed,
    random_targets_are_typed,
    maps_are_typed,
    identity_projection_has_a_name,
    a_fit_is_typed,
    code_prediction_is_typed,
    a_client_uses_all_quantizers,
)
REFUSED = (
    misspelt_target,
    misspelt_name,
    misspelt_name_for_all_scales,
    misspelt_keyword_for_all_levels,
    misspelt_input_norm,
    misspelt_projection,
    misspelt_keyword,
    misspelt_keyword_for_all_scales,
    positional_sizes,
    positional_sizes_for_all_scales,
)
