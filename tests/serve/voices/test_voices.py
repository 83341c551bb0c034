"""The voice library over HTTP, in a folder and on a real S3 server."""

import io
import json

import openai
import pytest
import soundfile

from serve.http.errors import BadRequest
from serve.voices.voice_library import VoiceLibrary, check_name
from serve.voices.voice_store import open_voice_store
from tests.serve.conftest import recording
from tests.serve.speech.test_speech import ask, multipart

CONSENT = "Ann Example, recorded by herself on 3 May, agreed to its use for audiobooks."


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return str(tmp_path)
    bucket = request.getfixturevalue("bucket")
    bucket.open_to(monkeypatch)
    return f"{bucket.uri}/library"


def upload(url, name, content=None, headers=(), **fields):
    given = {"name": name, "consent": CONSENT, "transcript": "What I say in it, word by word, and more."} | fields
    body, kind = multipart(given, {"audio_sample": content or recording()})
    status, _, answer = ask(url, "/v1/audio/voices", body, {"content-type": kind} | dict(headers))
    return status, json.loads(answer)


def listed(url):
    return [voice["id"] for voice in json.loads(ask(url, "/v1/audio/voices")[2])["voices"]]


def test_voice_is_added_used_and_deleted(serve_local, place):
    one, other = serve_local(voices=place), serve_local(voices=place)
    assert listed(one.url) == listed(other.url) == []
    status, told = upload(one.url, "carl", recording(4.0, 48_000, channels=2))
    assert status == 201, told
    assert told["object"] == "audio.voice"
    assert any("2 channels" in warning for warning in told["warnings"])
    # The other process has listed the library within the last second, and still knows the name when it is asked for.
    assert ask(other.url, "/v1/audio/speech", {"input": "Hello.", "voice": "carl"})[0] == 200
    assert listed(one.url) == ["carl"]
    assert upload(other.url, "carl")[0] == 409
    library = VoiceLibrary(open_voice_store(place))
    voice = library.voices().recording("carl")
    assert voice.transcript == "What I say in it, word by word, and more."
    info = soundfile.info(io.BytesIO(voice.audio))
    assert (info.format, info.samplerate, info.channels) == ("FLAC", 48_000, 1)
    assert CONSENT in open_voice_store(place).read("carl.json").decode()
    assert ask(other.url, "/v1/audio/voices/carl", method="DELETE")[0] == 200
    assert open_voice_store(place).versions() == {}
    assert ask(other.url, "/v1/audio/voices/carl", method="DELETE")[0] == 404
    status, _, answer = ask(other.url, "/v1/audio/speech", {"input": "Hello.", "voice": "carl"})
    assert status == 400
    assert "no voice 'carl'" in json.loads(answer)["error"]["message"]


def test_re_added_voice_replaces_the_cached_one(place):
    library, other = VoiceLibrary(open_voice_store(place)), VoiceLibrary(open_voice_store(place))
    library.add("carl", recording(3.0, file_format="FLAC"), None, CONSENT)
    assert other.voices({"carl"}).recording("carl").duration_s == 3.0
    library.remove("carl")
    library.add("carl", recording(5.0, file_format="FLAC"), None, CONSENT)
    other._listed_s = float("-inf")
    assert other.voices({"carl"}).recording("carl").duration_s == 5.0


def test_only_one_of_two_concurrent_uploads_gets_a_name(place):
    stores = [open_voice_store(place), open_voice_store(place)]
    assert [store.create("x.json", b"1") for store in stores] == [True, False]
    assert stores[0].read("x.json") == b"1"


def test_openai_client_adds_a_voice(serve_local, tmp_path):
    server = serve_local(voices=str(tmp_path))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    made = client.audio.voices.create(name="dora", audio_sample=("d.wav", recording()), consent=CONSENT)
    assert made.id == "dora"
    assert client.audio.speech.create(model="m", voice={"id": "dora"}, input="Hello.").read()


@pytest.mark.parametrize(
    ("fields", "content", "status", "words"),
    [
        ({"name": "../x"}, None, 400, "a voice's name"),
        ({"name": "a/b"}, None, 400, "a voice's name"),
        ({"name": "a..b"}, None, 400, "a voice's name"),
        ({"name": ".x"}, None, 400, "a voice's name"),
        ({"name": "x" * 65}, None, 400, "a voice's name"),
        ({"name": ""}, None, 400, "a voice's name"),
        ({"name": "x", "consent": " "}, None, 400, "consent"),
        ({"name": "x", "transcript": "x" * 4001}, None, 400, "transcript"),
        ({"name": "x"}, b"not audio", 400, "not a WAV"),
        ({"name": "x"}, recording(0.1), 400, "too short"),
        ({"name": "x"}, recording(61.0, 8000), 400, "longer than 60 s"),
        ({"name": "x"}, b"RIFF" + bytes(11 << 20), 413, "bytes"),
        ({"name": "x"}, bytes(25 << 20), 413, "bytes"),
    ],
)
def test_invalid_upload_is_refused_and_leaves_no_files(serve_local, tmp_path, fields, content, status, words):
    server = serve_local(voices=str(tmp_path))
    answered, told = upload(server.url, fields.pop("name"), content, **fields)
    assert answered == status, told
    assert words in told["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_upload_without_a_library_is_refused(serve_local):
    server = serve_local()
    assert upload(server.url, "x")[0] == 400
    assert listed(server.url) == []


def test_voice_list_has_the_form_that_chat_clients_expect(server):
    voices = json.loads(ask(server.url, "/v1/audio/voices")[2])["voices"]
    assert {(voice["id"], voice["name"]) for voice in voices} == {
        ("ann", "ann"),
        ("profile:deep", "deep"),
        ("nova", "nova"),
    }


def test_unavailable_store_does_not_reveal_its_location(serve_local, tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    server = serve_local(voices=str(folder))
    folder.rmdir()
    for status, _, answer in (
        ask(server.url, "/v1/audio/voices"),
        ask(server.url, "/v1/audio/speech", {"input": "Hello.", "voice": "ann"}),
    ):
        assert status in (400, 503)
        assert "secret" not in answer.decode()


@pytest.mark.parametrize("name", ["ann", "a.b", "A-1_x"])
def test_voice_names(name):
    check_name(name)
    with pytest.raises(BadRequest):
        check_name(f"{name}\n")
