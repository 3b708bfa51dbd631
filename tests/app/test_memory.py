import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from cpm_rcnn.cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
size = 100 << 20
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"1") * size
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(faults * resource.getpagesize() / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_block_that_replaces_a_freed_one_gets_its_pages_without_page_faults():
    def share_faulted(setting: str) -> float:
        return float(subprocess.check_output([sys.executable, "-c", PROGRAM, setting], text=True))

    assert share_faulted("keep") < share_faulted("default") / 2
