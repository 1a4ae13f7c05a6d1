"""Compile the Triton kernels for GPUs that are not at hand, and read the compiler's report.

`python -m tests.kernels.ahead_of_time [WIDTH...]` prints a line for each architecture, width and look.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqssl.kernels import code_sums_triton, codebook_update_triton
from vqssl.kernels.nearest import looks_triton, prepare_triton, search_triton, tuning

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
POINTERS = {
    "codes": "*fp32", "constant": "*fp32", "centre": "*fp32", "bounds": "*fp32", "indices": "*i64", "rows": "*i64",
    "open_rows": "*i64", "open_count": "*i64", "close_rows": "*i64", "close_count": "*i64", "rivals": "*i32",
    "count": "*i64", "x": "*fp32", "rounded": "*fp16",
    "sums": "*fp32", "counts": "*i64", "order": "*i64", "first": "*i64",
    **dict.fromkeys(("embed", "cluster_size", "embed_avg", "new_embed", "new_counts", "new_size", "new_avg"), "*fp32"),
    **dict.fromkeys(("formed", "candidates"), "*fp32"),
    **dict.fromkeys(("rng", "tokens", "positions", "running", "hashes", "num_updates", "births"), "*i64"),
    **dict.fromkeys(("weight", "eps", "eps_of_all", "threshold"), "fp32"), "replaced": "*i8",
}  # fmt: skip


class Report(NamedTuple):
    """What the compiler says of a kernel."""

    registers: int
    spilled: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory per block."""
    sass: str
    """The machine code."""

    def instructions(self) -> Counter[str]:
        """Count the instructions of each kind."""
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)", self.sass, re.MULTILINE)
        return Counter(found)


def compile_for(kernel, capability, constants, config=None, *, fused=True, **types):
    """Compile `kernel` as it is launched with contiguous float32 tokens, rows and widths being multiples of 16."""
    constants = {"stride_d": 1, "code_stride_d": 1, **constants}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else types.get(name) or POINTERS.get(name, "i32")
        if signature[name] not in ("constexpr", "fp32"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {**(config.launch() if config else {"num_warps": 4}), "enable_fp_fusion": fused}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    return Report(int(used[1]), max(int(used[2]), int(used[3])), compiled.metadata.shared, sass)


def first_look(capability, dim, config=None, bits=None):
    """Compile the first look for 2048 codes, in the configuration that `dim` gets there or another one."""
    config = config or tuning.choose(capability, dim, "half")
    constants = {"COSINE": False, "CHUNKS": -(-dim // config.block_d), "ASSEMBLY": True, **config.blocks()}
    constants["BITS"] = search_triton.place_bits(2048, config) if bits is None else bits
    return compile_for(looks_triton.first_look, capability, constants, config), config


EXACT = ("close", "last", "last, cosine")
"""Kernels that compare in float64, and have no fused multiply-add, which would break exact ties."""
LAST = {"BLOCK_K": 128, "BLOCK_D": 64, "EXACT_D": 32}


def others(capability):
    """Compile the other kernels."""
    rounding = {"COSINE": False, "CHUNKS": 1, "BLOCK_K": 16, "BLOCK_D": 128}
    sums = {"BLOCK_N": 16, "BLOCK_D": 128}
    kernels = {
        "close": (looks_triton.close_calls, {"COSINE": False, "BLOCK_N": 16, "BLOCK_D": 64}),
        "last": (looks_triton.last_look, {"COSINE": False, **LAST}),
        "last, cosine": (looks_triton.last_look, {"COSINE": True, **LAST}),
        "centre": (prepare_triton.sample_centre, {"COSINE": False, "SAMPLE": 256, "BLOCK_D": 32}),
        "round": (prepare_triton.round_codes, rounding),
        "add tokens": (code_sums_triton.add_tokens, sums),
        "sum runs": (code_sums_triton.sum_runs, sums),
    }
    warps = {name: tuning.Config(1, 1, 1, 8, 3) for name in kernels if name.startswith("last")}
    found = {
        name: compile_for(kernel, capability, constants, warps.get(name), fused=name not in EXACT)
        for name, (kernel, constants) in kernels.items()
    }
    update = {"REVIVE": True, "ZERO_KEEPS_PLACE": True, "HAS_START": True, "BLOCK_K": 16, "BLOCK_D": 128}
    update |= {"BLOCK_M": 128, "BLOCK_S": 1024}
    for name in ("average", "divide_and_draw", "take", "hash_rows", "refuse_repeats", "write"):
        kernel = getattr(codebook_update_triton, name)
        found[name] = compile_for(kernel, capability, update, counts="*fp32")
    found["add many tokens"] = compile_for(code_sums_triton.add_tokens, capability, sums, sums="*fp64")
    return found


if __name__ == "__main__":
    for capability in ARCHITECTURES:
        for dim in map(int, sys.argv[1:] or ("64", "128", "256", "512")):
            report, config = first_look(capability, dim)
            tensor = {key: n for key, n in report.instructions().items() if "MMA" in key}
            print(
                f"sm_{capability[0]}{capability[1]} D={dim} {tuple(config)} "
                f"registers {report.registers} spilled {report.spilled} shared {report.shared} {tensor}",
                flush=True,
            )
