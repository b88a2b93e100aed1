"""One file a method: the contract, and the published rule."""
