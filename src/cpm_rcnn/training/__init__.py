"""Training under Lightning: the module, the schedule, and callbacks that keep a run alive and report its progress."""
