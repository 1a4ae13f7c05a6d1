#!/usr/bin/env bash
# Run all checks and benchmarks that need a GPU, in a few minutes: benchmarks/gpu_all.sh [FOLDER for the results].
# A part that fails does not stop the others; the script then exits with 1. $PYTHON is the interpreter (default python3).
# It needs torch with CUDA, triton, einops, numpy, tqdm and matplotlib; for the comparisons vector-quantize-pytorch,
# flash-kmeans and monai.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${1:-runs/gpu}
mkdir -p "$results"
failed=()

part() { # part SECONDS NAME COMMAND...
    local limit=$1 name=$2
    shift 2
    printf '\n==> %s\n' "$name"
    timeout "$limit" "$@" 2>&1 | tee "$results/gpu.$name.log" || failed+=("$name")
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee "$results/gpu.device.log"
part 200 check "$python" -m benchmarks.gpu_check
if command -v compute-sanitizer >/dev/null; then
    part 120 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.gpu_check --small
    part 120 racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m benchmarks.gpu_check --small
else
    failed+=("compute-sanitizer is not installed")
fi
part 60 band "$python" -m tests.reliability.band cuda
part 120 tune "$python" -m benchmarks.tune
part 120 search "$python" -m benchmarks.search --device cuda
part 60 train_step "$python" -m benchmarks.train_step --device cuda
part 40 memory "$python" -m benchmarks.memory --device cuda
part 60 dissect_step "$python" -m benchmarks.dissect_step --device cuda
part 300 codebook_usage "$python" -m benchmarks.codebook_usage --device cuda
part 40 profile "$python" - <<'PYTHON'
import torch
from vqssl.functional import nearest_codeword
x, codes = torch.randn(100352, 128, device="cuda"), torch.randn(2048, 128, device="cuda")
for _ in range(3):
    nearest_codeword(x, codes)
with torch.profiler.profile() as profile:
    for _ in range(20):
        nearest_codeword(x, codes)
    torch.cuda.synchronize()
print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20))
PYTHON
if command -v ncu >/dev/null; then
    part 60 ncu ncu --set basic --kernel-name regex:_look --launch-count 6 "$python" -c '
import torch
from vqssl.functional import nearest_codeword
x, codes = torch.randn(100352, 128, device="cuda"), torch.randn(2048, 128, device="cuda")
nearest_codeword(x, codes), nearest_codeword(x, codes)
torch.cuda.synchronize()'
else
    failed+=("ncu is not installed")
fi
# Runs become records by hand; the report and the documentation make their tables of records.
printf '\nto keep these runs:\n'
for file in runs/benchmarks/cuda.*.json; do
    [ -e "$file" ] || continue
    name=${file#runs/benchmarks/cuda.}
    echo "    python -m benchmarks.records add ${name%.json} $file"
done
[ ! -e runs/reliability/cuda.band.json ] || echo "    python -m benchmarks.records add reliability runs/reliability/cuda.band.json"
echo "    python -m benchmarks.report"
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
