"""Training with Lightning: the module, the schedule, and callbacks for interruptions, failures and progress."""
