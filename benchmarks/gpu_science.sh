#!/usr/bin/env bash
# The paper's setting on real X-rays: ResNet-18 at 224 px, K = 2048, D = 128, three scales; BYOL, DiSSECT, and DiSSECT with code
# prediction. Then the evaluation of the frozen encoders, and one archive of the results.
#     benchmarks/gpu_science.sh IMAGES.zip ABOUT.npz [FOLDER for runs and results [OPTION of the example...]]
#     LEASE=3000 benchmarks/gpu_science.sh kermany_cxr_224.zip kermany_cxr_64.npz runs/224 --optimization.epochs 100
#     benchmarks/gpu_science.sh --tiny [FOLDER]     all of it on a few generated images, on a CPU
# The same command continues after an interruption. What can be set beside it:
#     METHODS      "byol dissect dissect_codes"
#     SEEDS        "0"; the methods of a seed take turns, an epoch each, and are finished before the next seed begins
#     LEASE        seconds after which pretraining stops; evaluation and archive follow. No limit if not set
#     MASKS        kermany_v7_lungseg_128.npz, for the evaluation of lungs and codes
#     EVALUATE     protocols and options of examples.pretrain.evaluate; "none" leaves it out
#     CHECKPOINTS  1 puts checkpoints into the archive too: unpacked into FOLDER on another machine, they continue there
#     DEVICE       cuda
#     PYTHON       an interpreter with the packages of .ci/requirements/examples.txt
set -euo pipefail
begun=$SECONDS
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=${PYTHON:-python3}

if [ "${1:-}" = --tiny ]; then
    out=$(realpath -m "${2:-runs/tiny-224}")
    (cd "$here" && "$python" -m benchmarks.tiny_images "$out/source")
    export DEVICE=${DEVICE:-cpu} MASKS=${MASKS:-$out/source/masks.npz}
    export EVALUATE=${EVALUATE:-linear finetune segment-frozen --shares 0.2 1 --mask-shares 1 --subsets 2 --steps 2}
    set -- "$out/source/images.zip" "$out/source/about.npz" "$out" \
        --image-size 32 --encoder.width 8 --encoder.stem-stride 2 --optimization.batch-size 16 --optimization.epochs 2 \
        --optimization.warmup-epochs 1 --subsets 2 --byol.hidden-dim 32 --dissect.byol.hidden-dim 32 \
        --dissect.codebook-size 64 --dissect-codes.dissect.byol.hidden-dim 32 --dissect-codes.dissect.codebook-size 64 "${@:3}"
fi
: "${2:?give IMAGES.zip ABOUT.npz [FOLDER [OPTION...]], or --tiny}"
images=$(realpath "$1") about=$(realpath "$2") out=$(realpath -m "${3:-runs/224}")
shift $(($# < 3 ? $# : 3))
masks=${MASKS:+$(realpath "$MASKS")}
evaluate=${EVALUATE:-linear finetune anatomy ${masks:+codes segment-frozen segment-tuned --clusters 2048}}
device=${DEVICE:-cuda}
cd "$here"

archive() { # whatever ended the script: results of hours are worth keeping
    cd "$out"
    find . \( -path ./images -o -path ./source \) -prune -o -type f \( -name '*.json' -o -name '*.csv' -o -name '*.md' -o -name '*.png' \
        ${CHECKPOINTS:+-o -name checkpoint.pt -o -name '*.safetensors'} \) -print0 | tar --null -czf results.tar.gz.part -T -
    mv results.tar.gz.part results.tar.gz
    echo "archive: $out/results.tar.gz"
}
mkdir -p "$out"
trap archive EXIT

"$python" -m examples.pretrain.data.labelled_folder "$images" "$about" "$out/images"
runs=()
for seed in ${SEEDS:-0}; do
    run=$out/seed$seed
    left=${LEASE:+$((LEASE - SECONDS + begun))}
    if [ "${left:-1}" -gt 0 ]; then
        resume=$(compgen -G "$run/*/checkpoint.pt" > /dev/null && echo --resume || true)
        "$python" -m examples.pretrain paper --methods ${METHODS:-byol dissect dissect_codes} --data "$out/images" --out "$run" \
            --seed "$seed" --device "$device" $resume ${left:+--seconds "$left"} "$@"
    else
        echo "$LEASE s are over: no pretraining of seed $seed"
    fi
    if compgen -G "$run/*/checkpoint.pt" > /dev/null; then runs+=("$run"); fi
done
if [ "$evaluate" != none ] && [ ${#runs[@]} -gt 0 ]; then
    "$python" -m examples.pretrain.evaluate $evaluate ${masks:+--masks "$masks"} --unfinished \
        --runs "${runs[@]}" --data "$out/images" --device "$device" --out "$out/evaluation"
fi
