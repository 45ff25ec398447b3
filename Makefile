# `make demo` and `make test` set up everything they need in .venv by themselves.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint coverage clean

$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	mkdir -p demo
	$(VENV)/bin/onnxq quantize models/fashion_resnet.onnx --data models/fashion_calibration.npz \
	  --target cpu -o demo/fashion_resnet.int8.onnx --report demo/fashion_resnet.report.html
	$(VENV)/bin/onnxq compare models/fashion_resnet.onnx demo/fashion_resnet.int8.onnx --data models/fashion_test.npz
	$(VENV)/bin/onnxq quantize models/fashion_unet_guided.onnx --steps 20 -n 64 -o demo/fashion_unet.int8.onnx
	$(VENV)/bin/onnxq sample demo/fashion_unet.int8.onnx --against models/fashion_unet_guided.onnx \
	  --steps 20 -n 8 -o demo/fashion_unet.png

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Two files of tests at a time: most of a test runs on one core.
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

coverage: $(READY)
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest -n 2 --dist loadfile
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report

clean:
	rm -rf $(VENV) build dist demo *.egg-info
