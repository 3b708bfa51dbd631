"""What must stand before anything is imported."""

import os

import torch

# Without a card, Triton's kernels run on the CPU under its interpreter; it is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
