from pathlib import Path

import numpy as np
import pytest
import torch

from cpm_rcnn.boxes import CONVENTIONS

COMPONENTS = Path(__file__).parents[1] / "reference/components.npz"


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The models here are so small that several threads make them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONVENTIONS.values(), ids=lambda convention: convention.name)
def convention(request):
    return request.param


@pytest.fixture(scope="session")
def components():
    """Intermediate results of the CPM R-CNN release; see tests/reference/README.md."""
    return dict(np.load(COMPONENTS))
