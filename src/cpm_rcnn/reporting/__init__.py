"""Pictures, curves and tables of a run."""
