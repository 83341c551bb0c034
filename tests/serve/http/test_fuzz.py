"""Schemathesis sends valid and invalid requests generated from the OpenAPI document; none may cause a 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import recording

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
pytestmark = [
    pytest.mark.xdist_group("fuzz"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def schema(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "ann.wav").write_bytes(recording())
    server = start_server(voices=str(folder), max_script_chars=5000)
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


OPERATIONS = [
    ("POST", "/v1/audio/speech"),
    ("POST", "/v1/audio/scripts"),
    ("GET", "/v1/audio/voices"),
    ("POST", "/v1/audio/voices"),
    ("DELETE", "/v1/audio/voices/{voice_id}"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
]


def test_all_operations_are_covered(schema):
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {(operation.method.upper(), operation.path) for operation in operations} == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_responses_conform_to_the_schema(schema, method, path, mode):
    cases = schema[path][method].as_strategy(generation_mode=mode)

    @settings(max_examples=15, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def send(case):
        case.call_and_validate(checks=CHECKS, timeout=20)

    try:
        send()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # An operation without parameters has no invalid requests.
