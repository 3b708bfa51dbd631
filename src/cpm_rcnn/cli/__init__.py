"""The command line: Hydra around a task, one-line messages for user errors, and objects from a config."""
