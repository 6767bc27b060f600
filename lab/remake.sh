#!/usr/bin/env bash
# After lab.make: puts the new toy in its place and makes again all that hangs on its weights, on
# two cores in half an hour or so. What pages and notebooks say of it is left to whoever reads them.
#
#     pip install nbclient nbformat ipykernel; apt-get install chromium
#     bash lab/remake.sh runs/toy
set -euo pipefail
made=$(realpath "$1")
cd "$(dirname "$0")/.."
out=$(mktemp -d)
lane=
# The lane in the background ends with this script, however that ends.
trap 'kill $lane 2>/dev/null || true; rm -rf "$out"' EXIT

if [ ! -f "$made/weights/model.safetensors" ] || [ ! -f "$made/weights/record.json" ]; then
    echo "error: $made/weights holds no toy that lab.make has finished" >&2
    exit 1
fi
if ! grep -q '"dry_run": false' "$made/weights/record.json"; then
    echo "error: $made is a rehearsal (lab.make --dry-run): its weights are untrained" >&2
    exit 1
fi
find toy/weights -type f ! -name README.md -delete
cp "$made"/weights/* toy/weights/

one() {
    python -m lab.ablate settings --out "$out/one"
    for study in slots noise; do
        python -m lab.ablate "$study" --out "$out/other"
    done
}
other() {
    for study in overfit told rungs; do
        python -m lab.ablate "$study" --out "$out/other"
    done
    # Beside the study's own probes, whose MLLMs are older.
    python -m lab.ablate probes --out "$out/probes"
    python -m lab.evaluate --int8 --out "$out/int8"
    python -m lab.figures samples edits explain live
    python -m notebooks.run
}
# A thread each: two lanes on two cores.
export OMP_NUM_THREADS=1
one & lane=$!
other
wait "$lane"
cp "$out"/one/*.json "$out"/other/*.{json,png} assets/study/
cp "$out/int8/scores.json" assets/study/int8.json
cp "$out/probes/probes.json" assets/study/probes-toy.json
python -m lab.tables
