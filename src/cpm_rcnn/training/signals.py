"""The signals that ask a run to save and stop."""

import signal

# Clusters send SIGTERM at the end of a job's time or when they preempt it, and on request SIGUSR1 some time before.
SIGNALS = [signal.SIGTERM] + ([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])
