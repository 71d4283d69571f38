#!/bin/sh
# The main job end to end: a trace of a real (tiny) model in, placements, a comparison, plots out.
# demo.sh FOLDER [--profile]: with --profile the trace is made first, by running the model.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo-out}
mkdir -p "$out"

run() {
    echo "\$ $*"
    "$@"
}

if [ "${2:-}" = --profile ]; then
    echo "A DeepSeek-V2 of a million parameters, really trained on three tasks (traces/TINY.md), is run"
    echo "on held-out prompts; its routing is planned for. Real models are larger; the steps are the same."
    echo
    trace=$out/trace.parquet
    run prism-plan profile "$here/tiny-deepseek-v2" --prompts "$here/tiny-prompts.jsonl" \
        --max-new-tokens 32 --dtype float32 -o "$trace"
else
    echo "The routing of a DeepSeek-V2 of a million parameters, really trained on three tasks"
    echo "(traces/TINY.md), is planned for. Real models are larger; the steps are the same. Its trace is"
    echo "in the repository; 'make demo-model' makes it anew, by running the model."
    echo
    trace=$here/tiny-deepseek-v2.parquet
fi
python -m prism_plan.warm
run prism-plan check "$trace" "$here/tiny-cluster.toml"
echo
for solver in eplb prism exact; do
    run prism-plan solve "$trace" --cluster "$here/tiny-cluster.toml" \
        --solver "$solver" -o "$out/$solver.json"
done
run prism-plan check "$out/exact.json" --cluster "$here/tiny-cluster.toml" \
    --trace "$trace"
echo
echo "Plan on half of the requests, score on the other half:"
run prism-plan compare "$trace" --cluster "$here/tiny-cluster.toml" \
    --holdout 0.5 -o "$out/comparison.json"
echo
echo "What it means in time, on requests that were not planned on. The model is so small that a round"
echo "trip of 1 ms costs more than loading an expert, so offloading wins here; of real models it does not:"
run prism-plan simulate --trace "$trace" --cluster "$here/tiny-cluster.toml" \
    --holdout 0.5 --solvers eplb,layer-partition,prism,exact --offload --requests 50 \
    -o "$out/simulation.json"
run prism-plan migrate "$out/prism.json" "$out/exact.json" --cluster "$here/tiny-cluster.toml" \
    -o "$out/migration.json"
run prism-plan plot cdf "$out/simulation.json" -o "$out/cdf.png"
run prism-plan plot heatmap "$trace" -o "$out/heatmap.png"
run prism-plan plot entropy "$trace" -o "$out/entropy.png"
run prism-plan plot placement "$out/exact.json" -o "$out/placement.png"
run prism-plan plot comparison "$out/comparison.json" -o "$out/comparison.png"
echo
echo "In $out: eplb.json, prism.json, exact.json, comparison.json, simulation.json,"
echo "migration.json and five plots."
