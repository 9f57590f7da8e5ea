# make demo: install into .venv and make the demo video.   make test: install and run all tests that this machine can.
# make fuzz: 10,000 mutated inputs for each reader.   make kills: 100 runs that are killed, 40 at once in one folder, five batches.
# make lora-table: every naming, kind, rank and storage of LoRA.
# make hour: an hour of speech through the demo, in flat memory.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Processes that share the tests out; each takes up to 2 GB.
TEST_JOBS ?= 2

COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
# An interpreter with what ComfyUI needs and this pack; comfy-cli makes it beside ComfyUI or inside.
COMFYUI_PYTHON ?= $(firstword $(wildcard $(COMFYUI_PATH)/.venv/bin/python $(COMFYUI_PATH)/../venv/bin/python) $(BIN)/python)

.PHONY: demo cluster-demo test fuzz kills hour lora-table lint docs comfyui-test gpu-test gpu-memcheck gpu-trend clean

demo: $(VENV)/.installed
	@$(BIN)/wanvideo demo

# A Ray cluster of two CPU workers on this machine makes four talking videos; a second call finds them done.
cluster-demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/wanvideo batch demo/cluster.jsonl --ray local --workers 2 --device cpu \
	    --models demo/models --input demo/input --out output/cluster

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

fuzz: $(VENV)/.installed
	# It has no build for every system; without it hypothesis alone is used.
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3'
	@FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -rs tests/fuzz tests/wanvideo/test_headers.py tests/wanvideo/test_lora_generated.py

kills: $(VENV)/.installed
	@KILLS=100 PAIRS=20 BATCH_KILLS=1 $(BIN)/python -m pytest tests/headless/test_kills.py tests/headless/test_batch_kills.py

lora-table: $(VENV)/.installed
	@LORA_TABLE=all $(BIN)/python -m pytest tests/wanvideo/test_lora_table.py

hour: $(VENV)/.installed
	@SPEECH_SECONDS=3600 $(BIN)/python -m pytest tests/headless/test_hour.py

lint: $(VENV)/.installed
	@$(BIN)/ruff check .

# The real server and front end; skips, with the reason, what this machine lacks.
comfyui-test: $(VENV)/.installed $(COMFYUI_PATH)/main.py
	COMFYUI_PATH="$(COMFYUI_PATH)" COMFYUI_PYTHON="$(COMFYUI_PYTHON)" $(BIN)/python -m pytest tests/comfyui -m comfyui -rs

# Only where there is none yet. It needs a network, and makes COMFYUI_PATH/.venv, which COMFYUI_PYTHON then is.
$(COMFYUI_PATH)/main.py: | $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt comfy-cli \
	    && $(BIN)/comfy --skip-prompt --workspace "$(COMFYUI_PATH)" install --cpu --skip-manager \
	    && "$(COMFYUI_PATH)/.venv/bin/python" -m pip install --quiet -r requirements.txt playwright \
	    && "$(COMFYUI_PATH)/.venv/bin/python" -m playwright install chromium

# Processes that share a GPU's tests out; on a large GPU more of them are several times quicker.
GPU_TEST_JOBS ?= 1
gpu-test: $(VENV)/.installed
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	$(BIN)/python -m pytest -m cuda -rs -n $(GPU_TEST_JOBS)
	# Once more as ComfyUI runs nodes.
	WAN_INFERENCE_MODE=1 $(BIN)/python -m pytest -m cuda -q -n $(GPU_TEST_JOBS)

# Allocations one by one, so that an access past a tensor's end is seen and not served by its neighbour.
MEMCHECK := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1
gpu-memcheck: $(VENV)/.installed
	WAN_LAYOUT_EXAMPLES=30 $(MEMCHECK) $(BIN)/python -m pytest -q -m cuda \
	    tests/kernels tests/quantized/test_layouts.py tests/quantized/test_systems.py tests/wanvideo/test_quantization.py \
	    tests/s2v/test_s2v_quantized.py tests/animate/test_animate_quantized.py
	# Under it cuDNN's graphs outlive the interpreter, so that one test is left out.
	$(MEMCHECK) --report-api-errors no $(BIN)/python -m pytest -q -m cuda -k "not ends_without_a_word" \
	    tests/attention_backends/test_any_layout.py tests/test_attention_fp8.py

# Speed against the best of earlier runs on this card, which TREND keeps; fails where it is 5 % slower.
TREND ?= output/trend/best.json
gpu-trend: $(VENV)/.installed
	mkdir -p output
	$(BIN)/wanvideo bench step --model 1.3B --json output/step.json
	$(BIN)/python benchmarks/trend.py $(TREND) output/step.json

docs:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6,<10'
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: no later requirement may choose another build of it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) output
