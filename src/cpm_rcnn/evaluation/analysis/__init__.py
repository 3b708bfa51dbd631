"""Error analysis of an evaluation: what the HTML report shows."""
