"""States and options of codebooks, quantisers and fusion heads that no training gives, and states put in by others."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import vqssl
from benchmarks.attempts.attempt import Outcome, attempt

State = dict[str, Any]
NAN, INF = float("nan"), float("inf")


def _tokens(step: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(step))


def _codebook(**options: Any) -> vqssl.EMACodebook:
    return vqssl.EMACodebook(**{"codebook_size": 16, "dim": 8, **options})


def _trained(**options: Any) -> vqssl.EMACodebook:
    codebook = _codebook(**options)
    for step in range(3):
        codebook(_tokens(step))
    return codebook


def _quantizer(**options: Any) -> vqssl.MultiScaleQuantizer:
    return vqssl.MultiScaleQuantizer([8, 8], codebook_size=16, dim=8, **options)


def _bits(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _refused(module: nn.Module, load: Callable[[], object], *words: str) -> Outcome:
    """Survive if the call raises an error with these words and the module is as it was."""
    before = _bits(module)
    try:
        load()
        said = "accepted"
    except (ValueError, TypeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    after = _bits(module)
    same = all(torch.equal(after[name], before[name]) for name in before)
    named = said.startswith(("ValueError", "TypeError")) and all(word in said for word in words)
    return Outcome(named and same, f"{said[:200]}{'' if same else '; the module has changed'}")


def _damaged(module: nn.Module, key: str, value: Any, **how: Any) -> Outcome:
    """Load a state of which one entry was replaced, into a module of the same kind."""
    state: State = dict(_bits(module))
    state[key] = value(state[key]) if callable(value) else value
    return _refused(module, lambda: module.load_state_dict(state, **how), key)


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return put


@attempt("a state with one NaN in cluster_size", right="refused by name, nothing changes")
def nan_count() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(NAN))


@attempt("the same with assign=True", right="refused by name, nothing changes")
def nan_count_assigned() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(NAN), assign=True)


@attempt("the same with strict=False", right="refused by name, nothing changes")
def nan_count_not_strict() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(NAN), strict=False)


@attempt("an infinite count", right="refused by name, nothing changes")
def infinite_count() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(INF))


@attempt("a negative count", right="refused by name, nothing changes")
def negative_count() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(-1.0))


@attempt("a count of 1e30, one flipped bit of the exponent", right="refused by name, nothing changes")
def huge_count() -> Outcome:
    return _damaged(_trained(), "cluster_size", _first(1e30))


@attempt("NaN in a code", right="refused by name, nothing changes")
def nan_code() -> Outcome:
    return _damaged(_trained(), "embed", _first(NAN))


@attempt("an infinite sum", right="refused by name, nothing changes")
def infinite_sum() -> Outcome:
    return _damaged(_trained(), "embed_avg", _first(-INF))


@attempt("a float64 code beyond float32", right="refused by name, nothing changes")
def code_beyond_float32() -> Outcome:
    return _damaged(_trained(), "embed", lambda embed: _first(1e200)(embed.double()))


@attempt("codes of zeros under the cosine metric", right="refused by name, nothing changes")
def zero_code_under_cosine() -> Outcome:
    def zeroed(embed: Tensor) -> Tensor:
        embed[3] = 0
        return embed

    return _damaged(_trained(metric="cosine"), "embed", zeroed)


@attempt("num_updates of -7", right="refused by name, nothing changes")
def negative_updates() -> Outcome:
    return _damaged(_trained(), "num_updates", torch.tensor(-7))


@attempt("a draw counter with its highest bit flipped", right="refused by name, nothing changes")
def impossible_draws() -> Outcome:
    return _damaged(_trained(), "rng", torch.tensor([0, -(2**63) + 5]))


@attempt("rng cast to bfloat16 with the rest", right="refused by name, nothing changes")
def half_counters() -> Outcome:
    return _damaged(_trained(), "rng", lambda rng: rng.bfloat16())


@attempt("initialized of 7", right="refused by name, nothing changes")
def impossible_flag() -> Outcome:
    return _damaged(_trained(), "initialized", torch.tensor(7))


@attempt("initialized with three entries", right="refused by name, nothing changes")
def several_flags() -> Outcome:
    return _damaged(_trained(), "initialized", torch.tensor([True, False, True]))


@attempt("integer codes", right="refused by name, nothing changes")
def integer_codes() -> Outcome:
    return _damaged(_trained(), "embed", lambda embed: embed.long())


@attempt("a NumPy array in place of the counts", right="refused by name, nothing changes")
def numpy_counts() -> Outcome:
    return _damaged(_trained(), "cluster_size", np.ones(16, np.float32))


@attempt("NaN in the second of two codebooks", right="refused by name, the first does not change either")
def second_codebook() -> Outcome:
    quantizer = _quantizer()
    quantizer([_tokens(0), _tokens(1)])
    state = _bits(quantizer)
    state["codebooks.1.cluster_size"][0] = NAN
    fresh = _quantizer(seed=5)
    return _refused(fresh, lambda: fresh.load_state_dict(state), "codebooks.1.cluster_size")


@attempt("NaN in a projection of a multi-scale state", right="refused by name, nothing changes")
def projection() -> Outcome:
    return _damaged(_quantizer(), "projections.1.weight", _first(NAN))


@attempt("NaN in an OrthogonalProjection", right="refused by name, nothing changes")
def orthogonal_projection() -> Outcome:
    return _damaged(vqssl.OrthogonalProjection(8, 4), "weight", _first(NAN))


@attempt("NaN in a LearnedProjection", right="refused by name, nothing changes")
def learned_projection() -> Outcome:
    return _damaged(vqssl.LearnedProjection(8, 4), "0.bias", _first(INF))


@attempt("NaN in a weight of SERFFusion", right="refused by name, nothing changes")
def fusion() -> Outcome:
    return _damaged(vqssl.SERFFusion(8, 2, hidden_dim=16), "psi.1.weight", _first(NAN))


@attempt("a negative variance in SERFFusion's BatchNorm", right="refused by name, nothing changes")
def negative_variance() -> Outcome:
    return _damaged(vqssl.SERFFusion(8, 2, hidden_dim=16), "mlp.1.running_var", _first(-1.0))


@attempt("NaN in a codebook inside a larger model", right="refused by name, the codebook does not change")
def inside_a_model() -> Outcome:
    model = nn.ModuleDict({"vq": nn.Sequential(_trained())})
    return _damaged(model, "vq.0.cluster_size", _first(NAN))


@attempt("NaN in a state for a module on the meta device", right="refused by name")
def onto_meta() -> Outcome:
    state = _bits(_trained())
    state["cluster_size"][0] = NAN
    with torch.device("meta"):
        module = _codebook()
    return _refused(nn.Module(), lambda: module.load_state_dict(state, assign=True), "cluster_size")


@attempt("NaN written into the live counts", right="usage() calls no code alive")
def live_nan() -> Outcome:
    codebook = _trained()
    codebook.cluster_size[3] = NAN
    usage = codebook.usage()
    return Outcome(usage.dead.item() > 0 and usage.fraction.item() < 1, str(usage))


@attempt("every sound state of every kind", right="loads, in eval and training, copied and assigned")
def sound_states() -> Outcome:
    made: Mapping[str, Callable[[], vqssl.EMACodebook]] = {
        "fresh": _codebook,
        "trained": _trained,
        "cosine": lambda: _trained(metric="cosine"),
        "float64": lambda: _trained(dtype=torch.float64),
        "batch mean": lambda: _trained(ema="batch_mean"),
    }
    lost = []
    for name, make in made.items():
        for cast in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for assign in (False, True):
                source = make()
                state = {
                    key: value.to(cast) if value.is_floating_point() else value for key, value in _bits(source).items()
                }
                other = _codebook(metric=source.metric)
                try:
                    other.load_state_dict(state, assign=assign)
                    other(_tokens(9))
                    assert other.embed.dtype in (torch.float32, torch.float64)
                except Exception as error:
                    lost.append(f"{name}, {cast}, assign={assign}: {type(error).__name__}")
    return Outcome(not lost, f"{len(lost)} of 40 lost {lost[:2]}")


def _assigned(multiscale: bool, dtype: torch.dtype) -> Outcome:
    """Load a state of another dtype with assign=True, and compare 50 steps with those after a plain load."""
    source: nn.Module = _quantizer() if multiscale else _trained()
    if multiscale:
        source([_tokens(0), _tokens(1)])
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in _bits(source).items()}
    ends = []
    for assign in (False, True):
        module: nn.Module = _quantizer() if multiscale else _codebook()
        module.load_state_dict(state, assign=assign)
        module.eval()([_tokens(2), _tokens(3)] if multiscale else _tokens(2))
        module.train()
        for step in range(50):
            module([_tokens(step), _tokens(step + 1)] if multiscale else _tokens(step))
        ends.append({key: value for key, value in module.state_dict().items() if "projections" not in key})
    kept = all(value.dtype == torch.float32 for value in ends[1].values() if value.is_floating_point())
    gap = max((ends[1][key].double() - ends[0][key].double()).abs().max().item() for key in ends[0])
    return Outcome(kept and (gap < 1e-2 or multiscale), f"float32: {kept}; largest difference {gap:.1e}")


@attempt("a bfloat16 state with assign=True", right="codes stay float32, training as after a plain load")
def assigned_bfloat16() -> Outcome:
    return _assigned(multiscale=False, dtype=torch.bfloat16)


@attempt("a float16 state of several scales with assign=True", right="codes stay float32, training runs")
def assigned_float16_scales() -> Outcome:
    return _assigned(multiscale=True, dtype=torch.float16)


@attempt("a float8 state with assign=True", right="codes stay float32, training as after a plain load")
def assigned_float8() -> Outcome:
    return _assigned(multiscale=False, dtype=torch.float8_e4m3fn)


@attempt("float64 codes and float32 sums with assign=True", right="one dtype, training runs")
def assigned_mixture() -> Outcome:
    state = _bits(_trained())
    state["embed"] = state["embed"].double()
    codebook = _codebook()
    codebook.load_state_dict(state, assign=True)
    codebook(_tokens(5))
    dtypes = {str(tensor.dtype) for tensor in codebook.state()}
    return Outcome(len(dtypes) == 1, f"dtypes {sorted(dtypes)}")


@attempt("float flags and int32 counters with assign=True", right="bool and int64, training runs")
def assigned_flags() -> Outcome:
    state = _bits(_trained())
    state |= {"initialized": state["initialized"].float(), "rng": state["rng"].int()}
    state["num_updates"] = state["num_updates"].int()
    codebook = _codebook()
    codebook.load_state_dict(state, assign=True)
    codebook(_tokens(5))
    dtypes = [str(getattr(codebook, name).dtype) for name in ("initialized", "rng", "num_updates")]
    return Outcome(dtypes == ["torch.bool", "torch.int64", "torch.int64"], str(dtypes))


def _initialises(codebook: vqssl.EMACodebook) -> Outcome:
    """Survive if the codebook, which has random codes, initialises itself at its next training step."""
    codebook(_tokens(7))
    return Outcome(bool(codebook.initialized), f"initialized: {bool(codebook.initialized)}")


@attempt("functional_call with a trained state, then a step", right="the module itself initialises")
def functional_call_trained() -> Outcome:
    codebook = _codebook()
    functional_call(codebook, dict(_trained().state_dict()), (_tokens(),))
    return _initialises(codebook)


@attempt("functional_call with a fresh state in a trained module", right="the given state initialises")
def functional_call_fresh() -> Outcome:
    codebook, state = _trained(), _bits(_codebook())
    before = _bits(codebook)
    functional_call(codebook, state, (_tokens(),))
    same = all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())
    return Outcome(
        bool(state["initialized"]) and same, f"initialized: {bool(state['initialized'])}, module same: {same}"
    )


@attempt("functional_call of a pyramid with a trained state, then a step", right="all its codebooks initialise")
def functional_call_pyramid() -> Outcome:
    trained, fresh = _quantizer(), _quantizer()
    trained([_tokens(0), _tokens(1)])
    functional_call(fresh, dict(trained.state_dict()), ([_tokens(0), _tokens(1)],))
    fresh([_tokens(0), _tokens(1)])
    flags = [bool(fresh.codebook(scale).initialized) for scale in range(2)]
    return Outcome(all(flags), f"initialized: {flags}")


@attempt("an ensemble in eval mode by stack_module_state and vmap, then a step", right="the members initialise")
def stacked() -> Outcome:
    members = [_codebook(seed=seed) for seed in range(3)]
    for member in members:
        member(_tokens(member.seed))
    _, buffers = stack_module_state([member.eval() for member in members])
    base = copy.deepcopy(_codebook()).to("meta").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = vmap(lambda state, x: functional_call(base, state, (x,)).indices, (0, None))(buffers, _tokens(5))
    expected = torch.stack([member(_tokens(5)).indices for member in members])
    base.to_empty(device="cpu").reset_parameters()
    seen = _initialises(base.train())
    return Outcome(seen.survived and torch.equal(found, expected), seen.seen)


@attempt("swap_tensors gives a trained codebook a fresh state", right="it initialises")
def swapped() -> Outcome:
    codebook, fresh = _trained(), _codebook(seed=2)
    for name in _bits(codebook):
        torch.utils.swap_tensors(getattr(codebook, name), getattr(fresh, name))
    return _initialises(codebook)


@attempt("buffers of a fresh codebook copied into a trained one in place", right="it initialises")
def copied_in_place() -> Outcome:
    codebook = _trained()
    for name, value in _bits(_codebook(seed=2)).items():
        getattr(codebook, name).copy_(value)
    return _initialises(codebook)


@attempt("a fresh state loaded into a compiled training step", right="it initialises")
def loaded_into_compiled() -> Outcome:
    codebook = _trained()
    step: Any = torch.compile(codebook, backend="eager")
    step(_tokens(0))
    step.load_state_dict({f"_orig_mod.{name}": value for name, value in _bits(_codebook()).items()})
    step(_tokens(1))
    return Outcome(bool(codebook.initialized), f"initialized: {bool(codebook.initialized)}")


@attempt("a state loaded, then compiled with fullgraph=True", right="one graph, as the page on training loops says")
def compiled_after_load() -> Outcome:
    codebook, expected = _codebook(), _trained()
    codebook.load_state_dict(expected.state_dict())
    found = torch.compile(codebook, fullgraph=True, backend="eager")(_tokens(5))
    return Outcome(torch.equal(found.indices, expected(_tokens(5)).indices), "compiled")


@attempt("a copy of a module that functional_call used", right="the copy initialises")
def copied() -> Outcome:
    codebook = _codebook()
    functional_call(codebook, dict(_trained().state_dict()), (_tokens(),))
    return _initialises(copy.deepcopy(codebook))


@attempt("set_codes_ with a row of zeros under cosine", right="refused, nothing changes")
def zero_row_set() -> Outcome:
    codebook = _trained(metric="cosine")
    codes = _tokens(count=16)
    codes[4] = 0
    return _refused(codebook, lambda: codebook.set_codes_(codes), "codes", "zeros")


@attempt("a first batch of mostly zero tokens under cosine", right="all codes have length 1")
def zero_tokens_first() -> Outcome:
    codebook = _codebook(metric="cosine", revival=None)
    x = _tokens()
    x[8:] = 0
    codebook(x)
    lengths = codebook.embed.norm(dim=-1)
    return Outcome(bool((lengths - 1).abs().max() < 1e-5), f"lengths from {lengths.min():.2f} to {lengths.max():.2f}")


def _constructor(*words: str, build: Callable[[], object]) -> Outcome:
    try:
        build()
    except (TypeError, ValueError) as error:
        return Outcome(all(word in str(error) for word in words), f"{type(error).__name__}: {error}"[:200])
    return Outcome(False, "accepted")


@attempt('dtype="float32"', right="an error that says torch.float32")
def dtype_by_name() -> Outcome:
    return _constructor("dtype", "torch.float32", build=lambda: _codebook(dtype="float32"))


@attempt('dtype="float16" for a fusion head', right="an error that says torch.float16")
def dtype_of_fusion() -> Outcome:
    return _constructor("dtype", "torch.float16", build=lambda: vqssl.SERFFusion(8, 1, dtype="float16"))  # type: ignore[arg-type]


@attempt('process_group="x"', right="refused by name at construction")
def group_by_name() -> Outcome:
    return _constructor("process_group", build=lambda: _codebook(process_group="x"))


@attempt("the class of an estimator in place of an object", right="refused by name at construction")
def estimator_class() -> Outcome:
    class Estimator:
        def __call__(self, x: Tensor, quantized: Tensor) -> Tensor:
            return x

    return _constructor("estimator", "class", build=lambda: _codebook(estimator=Estimator))


@attempt("the class of a metric in place of a function", right="refused by name at construction")
def metric_class() -> Outcome:
    return _constructor("metric", "class", build=lambda: _codebook(metric=nn.Identity))


@attempt("a misspelt keyword, codebok_size=", right="an error that says codebook_size=")
def misspelt() -> Outcome:
    return _constructor("codebook_size=", build=lambda: vqssl.EMACodebook(codebok_size=8, dim=4))  # type: ignore[call-arg]


@attempt("a misspelt option of a multi-scale quantiser, comitment_weight=", right="an error that names both")
def misspelt_option() -> Outcome:
    return _constructor("MultiScaleQuantizer", "commitment_weight=", build=lambda: _quantizer(comitment_weight=1.0))


@attempt("a misspelt keyword of a fusion head, num_scale=", right="an error that says num_scales=")
def misspelt_fusion() -> Outcome:
    return _constructor("num_scales=", build=lambda: vqssl.SERFFusion(8, num_scale=1))  # type: ignore[call-arg]


def _foreign(flag: str, function: str) -> Outcome:
    embed = torch.randn(1, 16, 8)
    state = {"embed": embed, "embed_avg": embed, "cluster_size": torch.ones(1, 16), flag: torch.tensor(True)}
    codebook = _codebook()
    load = lambda: codebook.load_state_dict({f"_codebook.{name}": value for name, value in state.items()})  # noqa: E731
    return _refused(codebook, load, f"vqssl.interop.{function}")


@attempt("a state of vector-quantize-pytorch", right="the error names the function that reads it")
def state_of_vector_quantize_pytorch() -> Outcome:
    return _foreign("initted", "codebook_from_vector_quantize_pytorch")


@attempt("a state of encodec", right="the error names the function that reads it")
def state_of_encodec() -> Outcome:
    return _foreign("inited", "codebook_from_encodec")
