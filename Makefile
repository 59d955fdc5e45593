# make demo   draw faces, train the challenge's U-Net for a few minutes, sample, score
# make test   all tests and the linter
# Both make the environment in .venv first. Another interpreter: rm -rf .venv; make test PYTHON=/path/to/python3.10

# The first interpreter that really runs, can make environments, and has wheels for the pinned packages.
PYTHON ?= $(shell for p in python3.10 python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, venv, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
PY := .venv/bin/python
DEMO := results/demo
FACES := --data_root data/faces --split_dir data/faces
# Without the official Inception network (downloaded at first use), a stand-in beside the project will do.
FEATURES := $(addprefix --features ,$(wildcard ../shared/fid/inception-2015-12-05-mixed7.pt))

.PHONY: test demo
# One thread a worker: small networks gain little from two, and two workers on two cores nearly halve the time.
test: .venv/ready
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && timeout 300 apt-get install -y chromium >/dev/null 2>&1; } \
		|| echo "no browser here, and none can be installed: the test of the report's page is skipped"
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

.venv/ready: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10-3.13 with the venv module found: install one" \
		"(Debian: python3-venv), or name it: make PYTHON=..." >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

data/faces/val_split.txt: | .venv/ready
	$(PY) -m src.faces data/faces

# On a CPU a taste: four minutes of the challenge's U-Net at 32x32, where a step costs a quarter. On a GPU ten minutes
# at 64x64. Run again, it trains on from there. What hours of training give, the released small network shows.
demo: .venv/ready data/faces/val_split.txt
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then size=64; count=500; train="--preset quick --max_minutes 10"; \
	else size=32; count=64; train="--batch_size 4 --warmup 10 --max_minutes 4 --log_interval 10"; fi; \
	val=data/faces_val_$$size; features="$(FEATURES)"; set -ex; \
	test -d $$val || $(PY) -m src.evaluation reference $(FACES) --size $$size --out $$val; \
	$(PY) train.py $(FACES) --image_size $$size $$train --save_dir $(DEMO); \
	$(PY) sampling.py --ckpt_path $(DEMO)/final_model.pt --save_dir $(DEMO)/samples --num_samples $$count; \
	for nfe in 1 2 4; do \
		$(PY) -m src.evaluation score --generated $(DEMO)/samples/nfe=$$nfe --reference $$val $$features \
		|| { echo "no scores without a feature network; the samples are there"; break; }; \
	done
	$(PY) sampling.py --ckpt_path checkpoints/small32/int8.pt --save_dir $(DEMO)/small32 --num_samples 16
	@echo; echo "Look at:"; ls -t $(DEMO)/iter=*_grid.png | head -1; ls $(DEMO)/training_curves.png
	@ls -d $(DEMO)/samples/nfe=* $(DEMO)/small32/nfe=*
