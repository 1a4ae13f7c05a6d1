"""Keywords of other libraries and misspelt ones, and the error that names ours."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec

__all__ = ["FOREIGN_KEYWORDS", "FOREIGN_OBJECTIVE_KEYWORDS", "FOREIGN_TEACHER_KEYWORDS", "names_foreign_keywords"]

FOREIGN_KEYWORDS = {
    # vector-quantize-pytorch, taming-transformers, encodec, DAC, fairseq, vqtorch
    **dict.fromkeys(
        ("num_embeddings", "n_embeddings", "num_embed", "n_embed", "n_e", "num_codes", "num_vars", "bins"),
        "codebook_size=",
    ),
    **dict.fromkeys(("embedding_dim", "embed_dim", "e_dim", "code_dim", "vq_dim", "feature_size", "dimension"), "dim="),
    **dict.fromkeys(("commitment_cost", "commit_cost", "beta"), "commitment_weight="),
    "codebook_dim": "dim=, the width of the codes; the projection to it is a module of your own",
    "ema_decay": "decay=",
    "gamma": "decay= if it weighs the old statistics, commitment_weight= if it weighs the loss",
    "epsilon": "eps=",
    "use_cosine_sim": 'metric="cosine" if it is True, nothing if it is False',
    "l2_norm": 'metric="cosine" if it is True, nothing if it is False',
    "threshold_ema_dead_code": "revival=BatchRevival(threshold=), a fraction of the fair share; revival=None for 0",
    "kmeans_init": "initialization=KMeansInit() if it is True, nothing if it is False",
    "kmeans_iters": "initialization=KMeansInit(iterations=)",
    "rotation_trick": 'estimator="rotation" if it is True, nothing if it is False',
    "freeze_codebook": ".freeze() behind the constructor if it is True, nothing if it is False",
    "ema_update": ".freeze() behind the constructor if it is False, nothing if it is True",
    "accept_image_fmap": "vqssl.ChannelsFirst(...) around the module if it is True, nothing if it is False",
    "sync_codebook": "process_group=; ranks are found at call time",
}
"""What to write instead, by keyword of another library."""

FOREIGN_TEACHER_KEYWORDS = {
    # timm, ema-pytorch, torch.optim.swa_utils, solo-learn, lightly
    **dict.fromkeys(("decay", "ema_decay", "beta", "m", "base_tau", "base_tau_momentum"), "momentum="),
    "tau": "momentum= if it weighs the old weights, momentum=1 - tau if it weighs the student's",
    **dict.fromkeys(("final_tau", "final_tau_momentum", "end_decay"), "final_momentum="),
    **dict.fromkeys(("num_steps", "max_training_steps"), "total_steps="),
    "max_steps": "total_steps=, for lightly's cosine_schedule max_steps - 1",
    "use_buffers": 'buffers="ema" if it is True, buffers="own" if it is False',
    **dict.fromkeys(("ema_model", "teacher", "module"), "copy=, an existing copy to take over"),
}
"""What to write instead, by keyword of another library's moving average of weights."""

FOREIGN_OBJECTIVE_KEYWORDS = {
    # The letters of the paper's Eq. 7, and those of quantisers
    **dict.fromkeys(("lambda_vq", "vq_weight", "commitment_cost", "commit_weight"), "commitment_weight="),
}
"""What to write instead, by another name of a weight in the objective."""

Parameters = ParamSpec("Parameters")


def names_foreign_keywords(
    ours: Mapping[str, str],
    *,
    sizes_by_name: str,
    positional: int = 0,
    what: str = "sizes",
    passed_on: Iterable[str] = (),
) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Decorate an ``__init__``: an error for another library's or a misspelt keyword, or a positional size, names ours.

    Args:
        ours: what to write instead, by the other library's keyword.
        sizes_by_name: what to write instead of more positional arguments.
        positional: how many arguments may be positional.
        what: that which goes by name.
        passed_on: keywords that ``__init__`` takes by ``**`` and passes on.
    """

    def decorate(init: Callable[Parameters, None]) -> Callable[Parameters, None]:
        parameters = inspect.signature(init).parameters.values()
        own = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "self"]
        known = [*own, *passed_on]

        @functools.wraps(init)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            owner = type(args[0]).__name__
            for name in kwargs:
                if name in known:
                    continue
                if name in ours:
                    raise TypeError(f"{owner} has no argument {name!r}, which another library has: write {ours[name]}")
                near = difflib.get_close_matches(name, known, n=1)
                cure = f"write {near[0]}=" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{owner} has no argument {name!r}: {cure}")
            if any(isinstance(value, int | float) for value in args[1 + positional :]):
                raise TypeError(
                    f"{owner} takes its {what} by name, since libraries differ in their order, got "
                    f"{', '.join(map(repr, args[1 + positional :]))}: write {sizes_by_name}"
                )
            init(*args, **kwargs)

        return checked

    return decorate
