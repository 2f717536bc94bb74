#!/usr/bin/env bash
# Everything that has to be measured on a GPU, in about an hour: the benchmark, 300 steps at 7B with and without
# checkpointing, and a micro-world with a ten times larger backbone. Arguments go to the runs at 7B, such as
# --data-root DIR or --backbone PATH; without them Qwen2.5-7B and the sixteen data sets are downloaded.
set -euxo pipefail
cd "$(dirname "$0")/.."
python -m experiments.bench --shape qwen2.5-7b --out experiments/results/bench
python -m experiments.bench --shape qwen2.5-0.5b --out experiments/results/bench
large="train.py --preset qwen2.5-7b --stage multitask --base-steps 10 --multitask-steps 300 --no-references"
python $large --run runs/gpu/7b "$@"
python $large --run runs/gpu/7b-without-checkpointing --no-checkpointing "$@"
python -m tasks.pretrain --width 320 --layers 7 --out runs/gpu/backbone
python train.py --stage all --shots 8 32 --backbone runs/gpu/backbone --run runs/gpu/micro
