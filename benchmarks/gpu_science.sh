#!/usr/bin/env bash
# The paper's setting on real X-rays: ResNet-18 at 224 px, K = 2048, D = 128, three scales, BYOL and DiSSECT; then the evaluation of
# the frozen encoders. benchmarks/gpu_science.sh IMAGES.zip ABOUT.npz [FOLDER for runs and results [OPTION of the example...]]
#     benchmarks/gpu_science.sh kermany_cxr_224.zip kermany_cxr_64.npz runs/224 --optimization.epochs 100
# The same command continues after an interruption. $MASKS (kermany_v7_lungseg_128.npz) adds lungs and codes, $SEEDS ("0")
# more runs; $DEVICE is cuda, $PYTHON an interpreter with the packages of .ci/requirements/examples.txt.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
: "${2:?give IMAGES.zip ABOUT.npz [FOLDER [OPTION...]]}"
images=$(realpath "$1") about=$(realpath "$2") out=$(realpath -m "${3:-runs/224}")
shift $(($# < 3 ? $# : 3))
masks=${MASKS:+$(realpath "$MASKS")}
cd "$root"
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
runs=()

"$python" -m examples.pretrain.data.labelled_folder "$images" "$about" "$out/images"
for seed in ${SEEDS:-0}; do
    runs+=("$out/seed$seed")
    "$python" -m examples.pretrain paper --data "$out/images" --out "$out/seed$seed" --resume --seed "$seed" --device "$device" "$@"
done
"$python" -m examples.pretrain.evaluate linear finetune anatomy ${masks:+codes segment-frozen segment-tuned --masks "$masks" --clusters 2048} \
    --runs "${runs[@]}" --data "$out/images" --device "$device" --out "$out/evaluation"
