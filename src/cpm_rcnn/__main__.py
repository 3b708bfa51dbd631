"""``python -m cpm_rcnn COMMAND ...``, the same as the program ``cpm-rcnn``."""

from cpm_rcnn.console import main

if __name__ == "__main__":
    main()
