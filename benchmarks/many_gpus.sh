#!/usr/bin/env bash
# 70B models over N GPUs without P2P, with the KV memory that cards of 24, 32 and 48 GB leave: each part on and off.
#
#   benchmarks/many_gpus.sh 8 benchmarks/results/many_gpus                                       everything, one after another
#   benchmarks/many_gpus.sh 8 benchmarks/results/many_gpus Llama-3.1-70B sharegpt rtx-4090 all   one of them
#   DRY_RUN=1 benchmarks/many_gpus.sh 8 out                                                      says what it would run
#
# One run is one process of at most ten minutes and one JSON file; a file that is there is not measured again, so the
# same command goes on where it was stopped. A model that does not fit is said and left out. Weights are random.
# `python benchmarks/many_gpus.py table` puts the results beside what the simulator predicts.
set -euo pipefail

if (($# < 2)); then
	sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
	exit 2
fi
num_gpus=$1 folder=$2
models=${3:-Llama-3.1-70B Qwen2.5-72B} workloads=${4:-sharegpt longbench}
cards=${5:-rtx-4090 rtx-5090 l20} variants=${6:-all no-offload mixed no-offload-mixed}
here=$(dirname "$0") python=${PYTHON:-python}
export NCCL_P2P_DISABLE=1
mkdir -p "$folder"

run() { # prints a command, and runs it unless DRY_RUN is set
	echo "+ $*" >&2
	[ -n "${DRY_RUN:-}" ] || timeout --kill-after=20 600 "$@"
}

failed=0
for model in $models; do
	for card in $cards; do
		blocks=$("$python" "$here/many_gpus.py" blocks --model "$here/model_configs/$model" --card "$card" \
			--num-gpus "$num_gpus") || continue
		for workload in $workloads; do
			case $workload in
			sharegpt) dataset=(--dataset-path "$here/workloads/sharegpt_999.csv") ;;
			longbench) dataset=(--dataset-path "$here/traces/longbench_en.csv" --num-prompts 1000) ;;
			*) echo "many_gpus: workload $workload is not sharegpt or longbench" >&2 && exit 2 ;;
			esac
			for variant in $variants; do
				output=$folder/${num_gpus}x_${model}_${workload}_${card}_${variant}.json
				[ ! -e "$output" ] || continue
				case $variant in
				all) flags=(--phase-policy auto --kv-offload on) ;;
				no-offload) flags=(--phase-policy auto --kv-offload off) ;;
				mixed) flags=(--phase-policy mixed --kv-offload on) ;;
				no-offload-mixed) flags=(--phase-policy mixed --kv-offload off) ;;
				*) echo "many_gpus: variant $variant is none of all, no-offload, mixed, no-offload-mixed" >&2 && exit 2 ;;
				esac
				run pipemax bench throughput --model "$here/model_configs/$model" --load-format dummy --dtype bfloat16 \
					--pipeline-parallel-size "$num_gpus" --num-device-blocks "$blocks" --max-num-seqs 1024 \
					--max-num-batched-tokens 2048 "${dataset[@]}" "${flags[@]}" --output-json "$output" || failed=1
			done
		done
	done
done
exit $failed
