"""The voice library over HTTP, stored in a folder and on a real S3 server."""

import io
import json

import openai
import pytest
import soundfile

from serve.http.errors import BadRequest
from serve.voices.voice_library import VoiceLibrary, check_name
from serve.voices.voice_store import open_voice_store
from tests.serve.conftest import recording
from tests.serve.speech.test_speech import multipart, send_request

CONSENT = "Ann Example, recorded by herself on 3 May, agreed to its use for audiobooks."


@pytest.fixture(params=["folder", "s3"])
def library_uri(request, tmp_path, monkeypatch):
    """The URI of an empty library."""
    if request.param == "folder":
        return str(tmp_path)
    bucket = request.getfixturevalue("bucket")
    bucket.set_environment(monkeypatch)
    return f"{bucket.uri}/library"


def upload_voice(url, name, content=None, headers=(), **fields):
    """Upload a voice; return the status and the parsed response."""
    fields = {"name": name, "consent": CONSENT, "transcript": "What I say in it, word by word, and more."} | fields
    body, content_type = multipart(fields, {"audio_sample": content or recording()})
    status, _, response = send_request(url, "/v1/audio/voices", body, {"content-type": content_type} | dict(headers))
    return status, json.loads(response)


def list_voice_ids(url):
    """Return the ids of all voices."""
    return [voice["id"] for voice in json.loads(send_request(url, "/v1/audio/voices")[2])["voices"]]


def test_voice_is_added_used_and_deleted(start_server, library_uri):
    server, other = start_server(voices=library_uri), start_server(voices=library_uri)
    assert list_voice_ids(server.url) == list_voice_ids(other.url) == []
    status, body = upload_voice(server.url, "carl", recording(4.0, 48_000, channels=2))
    assert status == 201, body
    assert body["object"] == "audio.voice"
    assert any("2 channels" in warning for warning in body["warnings"])
    # The other process listed the library less than a second ago, but lists it again for an unknown name.
    assert send_request(other.url, "/v1/audio/speech", {"input": "Hello.", "voice": "carl"})[0] == 200
    assert list_voice_ids(server.url) == ["carl"]
    assert upload_voice(other.url, "carl")[0] == 409
    library = VoiceLibrary(open_voice_store(library_uri))
    voice = library.voices().recording("carl")
    assert voice.transcript == "What I say in it, word by word, and more."
    info = soundfile.info(io.BytesIO(voice.audio))
    assert (info.format, info.samplerate, info.channels) == ("FLAC", 48_000, 1)
    assert CONSENT in open_voice_store(library_uri).read("carl.json").decode()
    assert send_request(other.url, "/v1/audio/voices/carl", method="DELETE")[0] == 200
    assert open_voice_store(library_uri).list_versions() == {}
    assert send_request(other.url, "/v1/audio/voices/carl", method="DELETE")[0] == 404
    status, _, response = send_request(other.url, "/v1/audio/speech", {"input": "Hello.", "voice": "carl"})
    assert status == 400
    assert "no voice 'carl'" in json.loads(response)["error"]["message"]


def test_re_added_voice_replaces_the_cached_one(library_uri):
    library, other = VoiceLibrary(open_voice_store(library_uri)), VoiceLibrary(open_voice_store(library_uri))
    library.add("carl", recording(3.0, file_format="FLAC"), None, CONSENT)
    assert other.voices({"carl"}).recording("carl").duration_s == 3.0
    library.remove("carl")
    library.add("carl", recording(5.0, file_format="FLAC"), None, CONSENT)
    other._listed_s = float("-inf")
    assert other.voices({"carl"}).recording("carl").duration_s == 5.0


def test_only_one_of_two_concurrent_uploads_gets_a_name(library_uri):
    stores = [open_voice_store(library_uri), open_voice_store(library_uri)]
    assert [store.create("x.json", b"1") for store in stores] == [True, False]
    assert stores[0].read("x.json") == b"1"


def test_openai_client_adds_a_voice(start_server, tmp_path):
    server = start_server(voices=str(tmp_path))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    voice = client.audio.voices.create(name="dora", audio_sample=("d.wav", recording()), consent=CONSENT)
    assert voice.id == "dora"
    assert client.audio.speech.create(model="m", voice={"id": "dora"}, input="Hello.").read()


@pytest.mark.parametrize(
    ("fields", "content", "status", "message"),
    [
        ({"name": "../x"}, None, 400, "a voice name"),
        ({"name": "a/b"}, None, 400, "a voice name"),
        ({"name": "a..b"}, None, 400, "a voice name"),
        ({"name": ".x"}, None, 400, "a voice name"),
        ({"name": "x" * 65}, None, 400, "a voice name"),
        ({"name": ""}, None, 400, "a voice name"),
        ({"name": "x", "consent": " "}, None, 400, "consent"),
        ({"name": "x", "transcript": "x" * 4001}, None, 400, "transcript"),
        ({"name": "x"}, b"not audio", 400, "not a WAV"),
        ({"name": "x"}, recording(0.1), 400, "too short"),
        ({"name": "x"}, recording(61.0, 8000), 400, "longer than 60 s"),
        ({"name": "x"}, b"RIFF" + bytes(11 << 20), 413, "bytes"),
        ({"name": "x"}, bytes(25 << 20), 413, "bytes"),
    ],
)
def test_invalid_upload_is_refused_and_leaves_no_files(start_server, tmp_path, fields, content, status, message):
    server = start_server(voices=str(tmp_path))
    actual_status, body = upload_voice(server.url, fields.pop("name"), content, **fields)
    assert actual_status == status, body
    assert message in body["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_upload_without_a_library_is_refused(start_server):
    server = start_server()
    assert upload_voice(server.url, "x")[0] == 400
    assert list_voice_ids(server.url) == []


def test_voice_list_has_the_format_that_chat_clients_expect(server):
    voices = json.loads(send_request(server.url, "/v1/audio/voices")[2])["voices"]
    assert {(voice["id"], voice["name"]) for voice in voices} == {
        ("ann", "ann"),
        ("profile:deep", "deep"),
        ("nova", "nova"),
    }


def test_unavailable_store_does_not_reveal_its_location(start_server, tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    server = start_server(voices=str(folder))
    folder.rmdir()
    for status, _, response in (
        send_request(server.url, "/v1/audio/voices"),
        send_request(server.url, "/v1/audio/speech", {"input": "Hello.", "voice": "ann"}),
    ):
        assert status in (400, 503)
        assert "secret" not in response.decode()


@pytest.mark.parametrize("name", ["ann", "a.b", "A-1_x"])
def test_voice_names_are_validated(name):
    check_name(name)
    with pytest.raises(BadRequest):
        check_name(f"{name}\n")
