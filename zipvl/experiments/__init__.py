"""The paper's claims as commands: `python -m zipvl.experiments NAME`; pages: docs/experiments.md."""
