#!/bin/sh
# The main job end to end: a trace, placements by several solvers, a comparison, plots.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo-out}
mkdir -p "$out"

run() {
    echo "\$ $*"
    "$@"
}

echo "NOTE: this demonstration runs on a SYNTHETIC trace (prism_plan/profiling/synthetic.py):"
echo "NOTE: the numbers below show what the tool does, not how any model behaves."
echo
run python "$here/make_synthetic.py" "$out/synthetic.parquet"
run prism-plan check "$out/synthetic.parquet" "$here/paper-v2lite.toml"
echo
for solver in eplb prism exact; do
    run prism-plan solve "$out/synthetic.parquet" --cluster "$here/paper-v2lite.toml" \
        --solver "$solver" -o "$out/$solver.json"
done
run prism-plan check "$out/exact.json" --cluster "$here/paper-v2lite.toml" \
    --trace "$out/synthetic.parquet"
echo
echo "Plan on half of the requests, score on the other half:"
run prism-plan compare "$out/synthetic.parquet" --cluster "$here/paper-v2lite.toml" \
    --holdout 0.5 -o "$out/comparison.json"
run prism-plan plot heatmap "$out/synthetic.parquet" -o "$out/heatmap.png"
run prism-plan plot entropy "$out/synthetic.parquet" -o "$out/entropy.png"
run prism-plan plot placement "$out/exact.json" -o "$out/placement.png"
run prism-plan plot comparison "$out/comparison.json" -o "$out/comparison.png"
echo
echo "In $out: synthetic.parquet, eplb.json, prism.json, exact.json, comparison.json and four plots."
