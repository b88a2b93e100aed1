"""What was measured and how the demo model was trained; no part of the engine or its wheel."""
