"""The command line: the Hydra entry point, one-line error messages, and construction of objects from a config."""
