"""Options that cannot work: refused in a line before anything is drawn or written."""

import tempfile
from pathlib import Path

from benchmarks.attempts.attempt import Outcome, attempt
from benchmarks.attempts.failing import command, example, one_line

RIGHT = "one line that names the option; nothing drawn, nothing written"


def _refused(word: str, *options: str) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = example(*options, "--out", f"{name}/run")
        drawn = "drawing" in done.out
        return one_line(done, word, also=not drawn and not Path(name, "run").exists(), note=", drawn" if drawn else "")


def _other(word: str, module: str, *options: str) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = command("-m", f"examples.pretrain.{module}", *options, "--out", f"{name}/out")
        return one_line(done, word, also=not Path(name, "out").exists())


@attempt("--optimization.batch-size 0", right=RIGHT)
def no_batch() -> Outcome:
    return _refused("--optimization.batch-size", "--optimization.batch-size", "0")


@attempt("--optimization.batch-size -16", right=RIGHT)
def negative_batch() -> Outcome:
    return _refused("--optimization.batch-size", "--optimization.batch-size", "-16")


@attempt("--device cuda without a GPU", right=RIGHT)
def no_gpu() -> Outcome:
    return _refused("--device", "--device", "cuda:9")


@attempt("--device meta", right=RIGHT)
def meta_device() -> Outcome:
    return _refused("--device", "--device", "meta")


@attempt("--device hpu, of another vendor", right=RIGHT)
def foreign_device() -> Outcome:
    return _refused("--device", "--device", "hpu")


@attempt("--device gpu", right=RIGHT)
def no_such_device() -> Outcome:
    return _refused("--device", "--device", "gpu")


@attempt("--image-size 0", right=RIGHT)
def no_size() -> Outcome:
    return _refused("--image-size", "--image-size", "0")


@attempt("--image-size -3", right=RIGHT)
def negative_size() -> Outcome:
    return _refused("--image-size", "--image-size", "-3")


@attempt("--phantoms 0", right=RIGHT)
def no_phantoms() -> Outcome:
    return _refused("--phantoms", "--phantoms", "0")


@attempt("--byol.dim 0", right=RIGHT)
def no_width() -> Outcome:
    return _refused("--byol.dim", "--byol.dim", "0")


@attempt("--byol.hidden-dim -1", right=RIGHT)
def negative_width() -> Outcome:
    return _refused("--byol.hidden-dim", "--byol.hidden-dim", "-1")


@attempt("--byol.momentum nan", right=RIGHT)
def momentum_not_a_number() -> Outcome:
    return _refused("momentum", "--byol.momentum", "nan")


@attempt("--dissect.codebook-size 0", right=RIGHT)
def no_codes() -> Outcome:
    return _refused("codebook", "--methods", "dissect", "--dissect.codebook-size", "0")


@attempt("--dissect.commitment-weight nan", right=RIGHT)
def weight_not_a_number() -> Outcome:
    return _refused("commitment", "--methods", "dissect", "--dissect.commitment-weight", "nan")


@attempt("--dissect.target-weights inf -1", right=RIGHT)
def target_weights() -> Outcome:
    return _refused("target-weights", "--methods", "dissect", "--dissect.target-weights", "inf", "-1")


@attempt("--simsiam.bottleneck 0", right=RIGHT)
def no_bottleneck() -> Outcome:
    return _refused("--simsiam.bottleneck", "--methods", "simsiam", "--simsiam.bottleneck", "0")


@attempt("--dino.teacher-temperature 0", right=RIGHT)
def no_temperature() -> Outcome:
    return _refused("--dino.teacher-temperature", "--methods", "dino", "--dino.teacher-temperature", "0")


@attempt("--dira.queue -1", right=RIGHT)
def negative_queue() -> Outcome:
    return _refused("--dira.queue", "--methods", "dira", "--dira.queue", "-1")


@attempt("--transvw.words 0", right=RIGHT)
def no_words() -> Outcome:
    return _refused("--transvw.words", "--methods", "transvw", "--transvw.words", "0")


@attempt("--otcxr.iterations 0", right=RIGHT)
def no_iterations() -> Outcome:
    return _refused("--otcxr.iterations", "--methods", "otcxr", "--otcxr.iterations", "0")


@attempt("evaluate --device meta", right=RIGHT)
def evaluate_on_meta() -> Outcome:
    return _other("--device", "evaluate", "--device", "meta")


@attempt("compare --device meta", right=RIGHT)
def compare_on_meta() -> Outcome:
    return _other("--device", "compare", "--device", "meta")


@attempt("compare --image-size 0", right=RIGHT)
def compare_without_size() -> Outcome:
    return _other("--image-size", "compare", "--image-size", "0")


@attempt("ablate --seeds -1", right=RIGHT)
def ablate_with_a_negative_seed() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        code = "import sys, numpy as np\nfrom examples.pretrain.phantoms import make_phantoms\n"
        script = Path(name, "make.py")
        script.write_text(
            code + "drawn = make_phantoms(96, 32)\nnp.savez(sys.argv[1], images=drawn.images, labels=drawn.labels)\n"
        )
        command(script, f"{name}/images.npz")
        done = command(
            *("-m", "examples.pretrain.ablate", "--data", f"{name}/images.npz", "--seeds", "-1", "--part", "0/30"),
            *("--runs", f"{name}/runs", "--results", f"{name}/results", "--image-size", "32", "--subsets", "1"),
        )
        return one_line(done, "--seeds", also=not Path(name, "results").exists())
