VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint type bench gpu clean
$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV) && $(RUN) -m pip install -q $$(grep ^torch== constraints.txt) && $(RUN) -m pip install -q -c constraints.txt -e .[dev,plot] && touch $@
demo: $(VENV)/ready
	$(RUN) -m lab.demo.make_clip build/film.mp4
	$(RUN) generate.py -v build/film.mp4 -n 2400 -p "List all objects in order." --max-new-tokens 32 \
	  --compare dense,zipvl,zipvl-stream --report demo-report.html
test: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 4
lint: $(VENV)/ready
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
type: $(VENV)/ready
	$(RUN) -m mypy
bench: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(RUN) bench.py decode --tokens 2048,8192 --ratios 1,0.3 --layers 4
gpu: $(VENV)/ready
	$(RUN) -m lab.gpu $(if $(DRY),--dry)
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
