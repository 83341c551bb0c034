"""Speech over HTTP, with OpenAI's client and others."""

import base64
import io
import json
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import soundfile

from higgs_model import Script
from higgs_model.audio.writers import to_pcm16
from higgs_model.synthesizer.fake import FakeSynthesizer
from tests.serve.conftest import recording

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(url, path, body=None, headers=(), method=None):
    """Send a request; return status, headers and body."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data, {"content-type": "application/json"} | dict(headers), method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def fake_pcm(row):
    """Return the synthesizer's samples for a row, without the endpoint."""
    import asyncio

    from higgs_model.script.plan import Plan
    from higgs_model.script.voices import Voices

    async def collect():
        plan = Plan.of(Script.model_validate({"seed": 0} | row), Voices())
        return [piece.samples_N async for piece in FakeSynthesizer().stream(plan)]

    return b"".join(to_pcm16(samples).tobytes() for samples in asyncio.run(collect()))


def test_openai_client_receives_the_exact_samples(client):
    spoken = client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, response_format="pcm")
    assert spoken.read() == fake_pcm({"id": "x", "text": TEXT})
    assert spoken.response.headers["x-sample-rate"] == "24000"
    assert "alloy" in spoken.response.headers["x-warnings"]


@pytest.mark.parametrize("response_format", ["wav", "mp3", "opus", "flac", "pcm"])
@pytest.mark.parametrize("streaming", [False, True])
def test_openai_client_in_every_format(client, tmp_path, response_format, streaming):
    arguments = {"model": "tts-1", "voice": "nova", "input": TEXT, "response_format": response_format}
    path = tmp_path / f"x.{response_format}"
    if streaming:
        with client.audio.speech.with_streaming_response.create(**arguments) as answer:
            answer.stream_to_file(path)
    else:
        client.audio.speech.create(**arguments).write_to_file(path)
    wanted = np.frombuffer(fake_pcm({"id": "x", "text": TEXT}), np.int16)
    samples = decoded(path.read_bytes(), response_format, len(wanted))
    if response_format in ("wav", "flac", "pcm"):
        assert len(samples) == len(wanted)
    assert abs(len(samples) - len(wanted)) < 0.1 * 24_000
    assert 0.9 < np.std(samples) / np.std(wanted) < 1.1


def decoded(content, response_format, wanted):
    """Return the 16-bit samples of a stream."""
    if response_format == "pcm":
        return np.frombuffer(content, np.int16)
    if response_format == "flac":
        # A FLAC stream does not say how long it is: other decoders do not mind, libsndfile has to be told.
        assert content[21] & 0x0F == 0
        assert content[22:26] == bytes(4)
        content = content[:22] + wanted.to_bytes(4, "big") + content[26:]
    return soundfile.read(io.BytesIO(content), dtype="int16")[0]


def test_default_is_mp3_that_can_be_concatenated(client):
    spoken = client.audio.speech.create(model="tts-1", voice="nova", input=TEXT).read()
    assert spoken[0] == 0xFF
    assert spoken[1] & 0xE0 == 0xE0
    assert not any(mark in spoken[:2000] for mark in (b"ID3", b"Xing", b"Info"))
    once, twice = (len(soundfile.read(io.BytesIO(content))[0]) for content in (spoken, spoken + spoken))
    assert twice == 2 * once


def test_wav_stream_declares_an_unknown_length(client):
    spoken = client.audio.speech.create(model="m", voice="nova", input=TEXT, response_format="wav").read()
    assert spoken[4:8] == spoken[40:44] == b"\xff\xff\xff\xff"


def test_events_have_openais_form(client):
    with client.audio.speech.with_streaming_response.create(
        model="tts", voice="nova", input=TEXT, response_format="pcm", stream_format="sse"
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == fake_pcm({"id": "x", "text": TEXT})
    assert done["type"] == "speech.audio.done"
    assert done["usage"] == {"input_tokens": 14, "output_tokens": 122, "total_tokens": 136}


@pytest.mark.parametrize("speed", [0.5, 1.25, 4.0])
def test_speed_changes_duration_but_not_pitch(client, speed):
    def spectrum_peak(pcm):
        samples = np.frombuffer(pcm, np.int16)[4800:-4800].astype(float)
        return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * 24_000 / len(samples)

    normal, changed = (
        client.audio.speech.create(model="m", voice="nova", input=TEXT * 3, response_format="pcm", speed=chosen).read()
        for chosen in (1.0, speed)
    )
    assert len(changed) == pytest.approx(len(normal) / speed, rel=1e-3)
    assert spectrum_peak(changed) == pytest.approx(spectrum_peak(normal), rel=0.02)


def test_unknown_fields_are_ignored(server):
    body = {"input": "Hello.", "model": None, "voice": {"id": "ann"}, "user": "x", "stream": True, "speed": None}
    assert ask(server.url, "/v1/audio/speech", body)[0] == 200
    # curl -d without a content type.
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert ask(server.url, "/v1/audio/speech", {"input": "Hello."}, form)[0] == 200


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"voice": "ann"}, "input", "required"),
        ({"input": ""}, "input", "at least 1"),
        ({"input": "  "}, "input", "set text or turns"),
        ({"input": "Hello.", "response_format": "aac"}, "response_format", "'pcm'"),
        ({"input": "Hello.", "speed": 5}, "speed", "less than or equal to 4"),
        ({"input": "Hello.", "stream_format": "x"}, "stream_format", "sse"),
        ({"input": "Hello.", "temperature": -1}, "temperature", "greater"),
        ({"input": "Hello.", "voice": "anne"}, None, "did you mean ann"),
        ({"input": "Hello.", "voice": "../ann"}, None, "no voice"),
        ({"input": "Hello.", "voice": "profile:deeper"}, None, "did you mean deep"),
        ({"input": "x" * 4097}, "input", "4096"),
        ({"input": "Hello.", "ref_audio": "/etc/passwd"}, "ref_audio", "never opens a path"),
        ({"input": "Hello.", "ref_audio": "http://127.0.0.1/x.wav"}, "ref_audio", "this URL is not allowed"),
        ({"input": "Hello.", "ref_audio": "file:///etc/passwd"}, "ref_audio", "this URL is not allowed"),
        ({"input": "Hello.", "ref_audio": "data:text,x"}, "ref_audio", "data URI"),
        (
            {"input": "Hello.", "ref_audio": base64.b64encode(b"RIFFxxxxWAVE" * 50).decode()},
            "ref_audio",
            "cannot be decoded",
        ),
        (b"{", None, "not JSON"),
        (b"[1]", None, "not an object"),
        (b'{"input": NaN}', None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
    ],
)
def test_invalid_request_names_the_field(server, body, param, words):
    status, headers, answer = ask(server.url, "/v1/audio/speech", body)
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/audio/speech", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("DELETE", "/v1/audio/voices/nobody", 404, "not_found"),
        ("DELETE", "/v1/audio/voices/..%2f..%2fann", 404, "not_found"),
    ],
)
def test_errors_have_openais_form(server, method, path, status, code):
    answered, _, answer = ask(server.url, path, method=method)
    assert (answered, json.loads(answer)["error"]["code"]) == (status, code)


def test_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="no voice 'anne'") as caught:
        client.audio.speech.create(model="m", voice="anne", input=TEXT)
    assert caught.value.code == "invalid_request"


def test_special_tokens_in_text_are_literal(server):
    text = "<|audio_out_bos|> <|end_of_text|> Hello."
    status, _, _ = ask(server.url, "/v1/audio/speech", {"input": text, "response_format": "pcm"})
    assert status == 200
    prompt = server.backend.requests[-1].row["text"]
    assert prompt == text


def test_reference_is_base64_a_data_uri_or_a_file(server):
    content = recording(3.0, file_format="FLAC")
    plain = base64.b64encode(content).decode()
    for value in (plain, f"data:audio/flac;base64,{plain}"):
        body = {"input": "Hello.", "ref_audio": value, "ref_text": "What it says, word by word, and more."}
        status, _, _ = ask(server.url, "/v1/audio/speech", body)
        assert status == 200
        assert server.backend.requests[-1].reference == content
    body, kind = multipart({"input": "Hello.", "seed": "7", "speed": "1.5"}, {"ref_audio": content})
    status, _, _ = ask(server.url, "/v1/audio/speech", body, {"content-type": kind})
    assert status == 200
    job = server.backend.requests[-1]
    assert (job.reference, job.row["seed"], job.row["ref_audio"]) == (content, 7, "ref_audio")


def multipart(fields, files):
    """Return the body and content type of a multipart form."""
    edge = "edge-of-a-part"
    parts = []
    for name, value in fields.items():
        parts.append(f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, content in files.items():
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="../../x.wav"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"
