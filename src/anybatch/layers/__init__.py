"""The layers: one method a file, read top-down (equation, pure step, module)."""
