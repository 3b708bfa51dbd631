import pytest

from remote_servers import CREDENTIALS, be_quick, http_server, s3_server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    be_quick(monkeypatch)
    monkeypatch.setenv("CPM_RCNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def http():
    with http_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_for_all():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_for_all, monkeypatch):
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_for_all.url}.items():
        monkeypatch.setenv(name, value)
    s3_for_all.requests.clear()
    s3_for_all.faults.clear()
    return s3_for_all
