"""Accuracy of methods on questions with known answers; the command is `python -m lab.eval`."""
