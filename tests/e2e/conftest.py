"""One zoo and one `ashlar serve` for all tests that only talk to it."""

import openai
import pytest
import servers


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """The folder of a zoo with the demo family, and the names of its models."""
    folder = tmp_path_factory.mktemp("zoo")
    return folder, servers.make_zoo(folder)


@pytest.fixture(scope="session")
def models(zoo):
    return zoo[1]


@pytest.fixture(scope="session")
def server(zoo, tmp_path_factory):
    serve = servers.Serve(zoo[0], tmp_path_factory.mktemp("serve") / "serve.log")
    try:
        serve.api.wait_for_models(zoo[1])
        yield serve.api
    finally:
        status = serve.terminate()
    assert serve.complaints() == []
    assert status == 0


@pytest.fixture(scope="session")
def client(server):
    return client_of(server)


def client_of(api) -> openai.OpenAI:
    # No retries: a test must see the first answer.
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=120)
