"""The paper's claims as commands, `python -m zipvl.experiments NAME`; see docs/experiments.md."""
