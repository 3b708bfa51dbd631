"""Weight files: safe reading, conversion, initialization of a model, resuming a run, and atomic writing."""
