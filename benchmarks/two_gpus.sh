#!/usr/bin/env bash
# Speed, overlap and parity of two GPUs of one host, most wanted first, in at most seven minutes; logs go to $OUT.
# From the repository's root, where the package can be imported as wanvideo_wrapper: benchmarks/two_gpus.sh
export NCCL_NVLS_ENABLE=0 OUT="${OUT:-output/two_gpus}"
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$OUT/machine.log" 2>&1
nvidia-smi topo -m >>"$OUT/machine.log" 2>&1

# step LOG SECONDS COMMAND...: a step that fails or takes too long does not keep the next ones from running.
step() {
  local log="$OUT/$1.log" began=$SECONDS
  timeout --kill-after=5 "$2" "${@:3}" >"$log" 2>&1
  echo "$1: status $?, $((SECONDS - began)) s" | tee -a "$OUT/steps.log"
}

# Ratio to one card, peaks and host memory: without and with CFG, and InfiniteTalk.
step speed 140 python benchmarks/gpus.py
# What each form of overlap brings, and how much of NCCL runs beside other kernels.
step overlap 105 python benchmarks/gpus.py --cases "14B 832x480" --overlap none projections --trace /tmp/trace.json
# bf16: two cards against one, beside one card with another kernel.
step parity 85 python benchmarks/gpus.py --option disabled:sdpa --other-kernel --cases "14B 832x480" --steps 1
grep -h '^{' "$OUT"/*.log
