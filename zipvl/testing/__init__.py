"""For whoever writes a method: check_policy tells whether it keeps the contract of policy.py."""

from .contract import check_policy

__all__ = ["check_policy"]
