"""``python -m cpm_rcnn.ops.compile_kernels``: compile the CPU kernels ahead of their first use.

For images and clusters where the first use has no compiler or cannot write to the cache. It prints the path of each
library. The exit status is 1 if one is missing or cannot be loaded.
"""

import argparse
import sys

from cpm_rcnn.ops.kernel_build import build_kernels
from cpm_rcnn.ops.kernel_cache import KernelError
from cpm_rcnn.ops.libraries import load_library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    libraries, failure = build_kernels()
    for path in libraries.values():
        try:
            load_library(path)
            print(path)
        except KernelError as error:
            failure = failure or str(error)
    if failure is not None:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
