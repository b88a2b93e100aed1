"""The paper's claims as commands, `python -m lab.experiments NAME`; see docs/experiments.md."""
