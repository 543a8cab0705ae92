# Each target sets up what it needs in .venv; Python 3.11 or newer is all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test quick check bench site clean

# Everything the tests need; `make demo` needs less.
install: .venv/dev

.venv/run: scripts/install.py pyproject.toml constraints.txt
	$(PYTHON) scripts/install.py
	@touch $@

.venv/dev: scripts/install.py pyproject.toml constraints.txt
	$(PYTHON) scripts/install.py --extra dev
	@touch .venv/run $@

demo: .venv/run
	$(BIN)/tnllm train recipes/tiny.yaml --out runs/tiny
	$(BIN)/tnllm generate --model runs/tiny --prompt "My dear" --max-tokens 60 --seed 1

# The hooks of pre-commit, over every file.
check: install
	$(BIN)/pre-commit run --all-files

# Two workers of one thread each: the tests are many small tensors, where threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: check
	$(PYTEST)

# While working: without the tests marked slow, in under two minutes on two cores.
quick: install
	$(PYTEST) -m "not slow"

bench: install
	$(BIN)/tnllm bench-attn

# The documentation as a site in build/site; broken links fail.
site: install
	$(BIN)/python scripts/site.py

clean:
	rm -rf .venv build dist *.egg-info
