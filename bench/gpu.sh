#!/usr/bin/env bash
# Measures everything on one GPU in at most nine minutes, in order of value. Each step has its own
# time limit and writes its own JSON file into OUT, row by row; where one fails, the next goes on.
#
#     bench/gpu.sh OUT                 on a GPU
#     bench/gpu.sh OUT --rehearse      every step on the CPU, at a tiny size, in about a minute
#     STUDY=runs/study bench/gpu.sh OUT  the study's primary question instead, with all of the time:
#                                      dit, mllm, captions and gist in runs/study are what it starts from
#
# It needs a clone of this repository and the packages of requirements.txt; the rows beside the
# public libraries also transformers 4.51.3 and diffusers 0.34.0. PYTHON: which one runs it.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT [--rehearse]}
rehearse=${2:-}
python=${PYTHON:-python3}
total=530
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
patience=1
if [ "$rehearse" = --rehearse ]; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    STUDY=
    # A rehearsal looks for mistakes: on a busy machine it may take its time.
    patience=5
    total=$((total * patience))
elif [ -n "$rehearse" ]; then
    echo "error: $rehearse: expected --rehearse or nothing" >&2
    exit 1
fi
mkdir -p "$out"

# One line that says what is missing, before any work.
"$python" - "$rehearse" <<'CHECK' || exit 1
import importlib.util
import sys
needed = ("torch", "numpy", "tokenizers", "PIL", "tqdm", "safetensors", "matplotlib")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    raise SystemExit(f"error: {sys.executable} has no {', '.join(missing)}")
import torch
if not sys.argv[1] and not torch.cuda.is_available():
    raise SystemExit(f"error: PyTorch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; "
                     "--rehearse runs every step on the CPU")
CHECK

# step MODULE NAME SECONDS [OPTIONS]: at most so long, and never beyond the total.
step() {
    local module=$1 name=$2 limit=$(($3 * patience)) left=$((total - SECONDS)) start=$SECONDS
    shift 3
    if [ $left -lt 15 ]; then
        echo "== $name: left out, $left s are left"
        return
    fi
    [ "$limit" -gt $left ] && limit=$left
    timeout --kill-after=5 "$limit" "$python" -m "$module" "$name" --out "$out/$name.json" \
        $rehearse "$@" > >(tee -a "$out/log.txt") 2>&1
    local status=$?
    [ $status -eq 124 ] && echo "$name: stopped after $limit s" | tee -a "$out/log.txt"
    echo "== $name: status $status, $((SECONDS - start)) s" | tee -a "$out/log.txt"
}

# minutes SECONDS: as a decimal number.
minutes() {
    printf '%d.%d' $(($1 / 60)) $(($1 % 60 * 10 / 60))
}

: > "$out/log.txt"
step bench.gpu machine 40
if [ -n "${STUDY:-}" ]; then
    # Without the half minute that a last checkpoint and the tables take.
    step bench.gpu study $((total - SECONDS)) --study "$STUDY" \
        --minutes "$(minutes $((total - SECONDS - 30)))"
    echo "== all: $SECONDS s, in $out"
    exit
fi
step bench.gpu parity 75
step bench.gpu draw 90
step bench.gpu train 100
if "$python" -c "import diffusers, transformers
assert (transformers.__version__, diffusers.__version__) == ('4.51.3', '0.34.0')" 2> /dev/null; then
    step bench.gpu_peer peer 110
else
    echo "== peer: left out, transformers 4.51.3 and diffusers 0.34.0 are not here" |
        tee -a "$out/log.txt"
fi
step bench.gpu compile 90
# What is left, without the minute that the scores take.
seconds=$((total - SECONDS - 75))
[ $seconds -lt 6 ] && seconds=6
[ -n "$rehearse" ] && seconds=30
step bench.gpu toy 400 --minutes "$(minutes $seconds)"
[ -n "$rehearse" ] && step bench.gpu study 60 --minutes 10
echo "== all: $SECONDS s, in $out"
