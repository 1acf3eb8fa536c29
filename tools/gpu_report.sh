#!/usr/bin/env bash
# Measure what only a GPU shows, in at most ten minutes on one GPU.
#
#   bash tools/gpu_report.sh OUT            # needs data/lsp for the last part (tools/dataset_converters/lsp.py)
#   bash tools/gpu_report.sh OUT --small    # tiny settings, to try the script itself on a CPU
#
# OUT gets one text file a part, the tables as .json and .csv, and summary.txt. A part that fails, or takes longer than its
# limit, does not stop the others; the script then ends with 1. PYTHON names the interpreter.
set -uo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ] || { [ $# -gt 1 ] && [ "$2" != --small ]; }; then
    echo 'usage: bash tools/gpu_report.sh OUT [--small]' >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
small=${2:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python}
: > "$out/summary.txt"

part() { # NAME SECONDS COMMAND...: run a part, write what it says to NAME.txt and how it went to summary.txt
    local name=$1 limit=$(($2 * slack)) begin=$SECONDS state=done
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1
    case $? in
        0) ;;
        124) state='stopped at its limit' ;;
        *) state="failed: $(tail -n 1 "$out/$name.txt")" ;;
    esac
    echo "$name: $state, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

if ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && [ -z "$small" ]; then
    echo 'gpu_report.sh: torch sees no GPU here (--small tries the script on a CPU)' >&2
    exit 2
fi

slack=1
if [ -n "$small" ]; then
    slack=10 # the limits are a GPU's
    rounds=(--rounds 1 --warmup 1 --threads 1)
    batches=(2)
    large=2
    weights=(1M)
    demo=configs/demo/simcc_res18-half
    configs=("${demo}_demo-128x96.py" "${demo}_demo-128x96.py" "${demo}_w4a4_demo-128x96.py")
    data=(train_dataloader.dataset.data_root="$out/demo/" train_dataloader.num_workers=0)
    people=8
    methods=(base sam ausam-0.5)
else
    # In its first ten steps a method copies and compares what it only looks at later.
    rounds=(--rounds 10 --warmup 12)
    batches=(64 128)
    large=256
    weights=(25M 100M 1B)
    configs=(configs/study/{simcc_res50,rtmpose-s,simcc_res50_w4a4}_demo-256x192.py)
    data=(train_dataloader.dataset.data_root="$out/demo/" train_dataloader.dataset.indices=512)
    people=512
    methods=(base sam esam-history ausam-0.5 looksam msam)
fi

steps() { # NAME SECONDS CONFIG ARGUMENTS...: a part that measures steps
    local name=$1 limit=$2 config=$3
    shift 3
    part "$name" "$limit" $python tools/benchmark.py "$config" --floors "${rounds[@]}" --out "$out/$name.json" "$@" \
        --cfg-options "${data[@]}"
}

# These three are not timed.
part doctor 60 $python -m mm_sharp.doctor &
part tests 150 $python -m pytest -q -p no:cacheprovider tests/step/test_device.py &
part data 60 $python tools/make_demo_data.py --out "$out/demo" --train $people --val 4 --seed 0 &
wait
steps simcc 150 "${configs[0]}" --amp --batch-size "${batches[@]}" --methods "${methods[@]}"
steps simcc-large 90 "${configs[0]}" --amp --batch-size $large --methods base sam ausam-0.5
steps rtmpose 90 "${configs[1]}" --batch-size $large --methods base sam ausam-0.5
steps quantized 90 "${configs[2]}" --batch-size "${batches[0]}" --methods base sam ausam-0.5
part host 60 $python tools/benchmark.py --host "${rounds[@]}" --methods base sam ausam-0.5 --out "$out/host.json"
part bandwidth 60 $python tools/benchmark.py --parameters "${weights[@]}" --rounds 10 --out "$out/bandwidth.json"
if [ -d data/lsp ] && [ -z "$small" ]; then
    part study 200 $python tools/study.py configs/study/lsp_gpu.yaml --out-dir "$out/study" --jobs $((($(nproc) + 1) / 2))
else
    echo 'study: left out, it needs a GPU and data/lsp' | tee -a "$out/summary.txt"
fi
! grep -qE ': (failed|stopped)' "$out/summary.txt"
