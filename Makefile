# Every target starts from a fresh machine: `env` makes .venv with the locked versions, once.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= configs/digits_class.yaml
RUN ?= runs/digits_class
BIN := .venv/bin
STAMP := .venv/.complete
VERB := $(BIN)/python -m pipeline

.DEFAULT_GOAL := help
.PHONY: help env demo test system-test soak clean

help:
	@echo "make demo         train a latent diffusion model on real handwritten digits and look at what it draws"
	@echo "make test         lint, types and the test suite"
	@echo "make system-test  several ranks, kills, restarts, a full disk, a real Slurm"
	@echo "make soak         kills, signals, failing disks and strategies at full count, hours; writes benchmarks/results/soak.jsonl"
	@echo "make env          .venv with the locked versions (the targets above call it)"
	@echo "make clean        remove what demo made: data/digits and runs/digits_*"

env: $(STAMP)

# torch first, by itself: what is installed after it then finds the build that is there.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is wanted, {v[0]}.{v[1]} came; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: env
	@echo "1/7 prepare: scikit-learn's handwritten digits, real images, become WebDataset tars"
	@$(VERB) prepare digits data/digits
	@echo "2/7 train-vae: an autoencoder that turns 32×32 pixels into 8×8 latents"
	@$(VERB) train-vae $(CONFIG)
	@echo "3/7 encode: every image becomes the moments of its latent"
	@$(VERB) encode $(CONFIG)
	@echo "4/7 train: a U-Net learns to denoise latents of the class it is told"
	@$(VERB) train $(CONFIG)
	@echo "5/7 export: a folder that diffusers opens"
	@$(VERB) export $(CONFIG)
	@echo "6/7 sample: ten images of each class"
	@$(VERB) sample $(CONFIG)
	@echo "7/7 evaluate: the drawn images beside the real ones"
	@$(VERB) evaluate $(CONFIG)
	@printf '%s\n' "" \
	  "Done. What there is now:" \
	  "  $(RUN)/report.html               all of it on one page: open it in a browser" \
	  "  $(RUN)/samples/grid.png          ten drawn images of each class: look at them" \
	  "  $(RUN)/samples/step-*.png        the same noise while it learned" \
	  "  $(RUN)/evaluation/nearest-*.png  drawn images beside the nearest ones it was trained on" \
	  "  $(RUN)/evaluation/bound.png      what held-out images cost, timestep by timestep" \
	  "  $(RUN)/scores.json               the scores above" \
	  "  runs/digits_vae/measured/        what the autoencoder gives back: reconstructions.png, interpolations.png, scores" \
	  "  $(RUN)/export/                   the model; diffusers opens it" \
	  "  $(RUN)/checkpoints/              what train goes on from;  $(RUN)/metrics.jsonl: every loss" \
	  "What to try next:" \
	  "  $(VERB) sample $(CONFIG) --classes seven,3 --guidance 4 --seed 1" \
	  "  $(VERB) train $(CONFIG) train.steps=3000        goes on where it was" \
	  "  $(VERB) train configs/digits_text.yaml          captions instead of classes; then export, sample --prompts" \
	  "  $(VERB) page $(CONFIG)      draw in a browser" \
	  "  $(VERB) prepare folder YOUR_PICTURES data/yours --size 64    a folder per class" \
	  "  README.md: your own images, several GPUs, a cluster"

# One thread: the tests' tensors are small, and threads that wait for busy cores spin.  A worker for each core, up to four,
# for each imports torch anew and many tests start ranks of their own.  Those of the system are two at a time, a file in one
# worker; Slurm's come after them, alone, for they have time limits.
test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not system" --numprocesses logical --maxprocesses 4 --dist worksteal --durations 20

system-test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m system --ignore tests/system/test_slurm.py --numprocesses 2 --dist loadfile --durations 20
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m system tests/system/test_slurm.py --durations 20

# What takes longer than a test may: its lines are committed.
soak: env
	mkdir -p benchmarks/results
	set -o pipefail; $(BIN)/python benchmarks/soak.py | tee benchmarks/results/soak.jsonl

clean:
	rm -rf data/digits runs/digits_class runs/digits_vae
