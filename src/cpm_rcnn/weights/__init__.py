"""Weight files: reading them safely, recognizing and converting them, starting and resuming from them, writing them."""
