"""Images, plots and tables of the results of a run."""
