"""Speech requests over HTTP, with OpenAI's client and without."""

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


def send_request(url, path, body=None, headers=(), method=None):
    """Send a request; return status, headers and body."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data, {"content-type": "application/json"} | dict(headers), method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def fake_pcm(row):
    """Return the 16-bit samples that the fake synthesizer generates for a row, without the endpoint."""
    import asyncio

    from higgs_model.script.plan import Plan
    from higgs_model.script.voices import Voices

    async def collect():
        plan = Plan.from_script(Script.model_validate({"seed": 0} | row), Voices())
        return [piece.samples_N async for piece in FakeSynthesizer().stream(plan)]

    return b"".join(to_pcm16(samples).tobytes() for samples in asyncio.run(collect()))


def test_openai_client_receives_the_exact_samples(client):
    content = client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, response_format="pcm")
    assert content.read() == fake_pcm({"id": "x", "text": TEXT})
    assert content.response.headers["x-sample-rate"] == "24000"
    assert "alloy" in content.response.headers["x-warnings"]


@pytest.mark.parametrize("response_format", ["wav", "mp3", "opus", "flac", "pcm"])
@pytest.mark.parametrize("streaming", [False, True])
def test_openai_client_receives_every_format(client, tmp_path, response_format, streaming):
    arguments = {"model": "tts-1", "voice": "nova", "input": TEXT, "response_format": response_format}
    path = tmp_path / f"x.{response_format}"
    if streaming:
        with client.audio.speech.with_streaming_response.create(**arguments) as response:
            response.stream_to_file(path)
    else:
        client.audio.speech.create(**arguments).write_to_file(path)
    expected = np.frombuffer(fake_pcm({"id": "x", "text": TEXT}), np.int16)
    samples = decode_audio(path.read_bytes(), response_format, len(expected))
    if response_format in ("wav", "flac", "pcm"):
        assert len(samples) == len(expected)
    assert abs(len(samples) - len(expected)) < 0.1 * 24_000
    assert 0.9 < np.std(samples) / np.std(expected) < 1.1


def decode_audio(content, response_format, num_samples):
    """Return the 16-bit samples of a stream whose length is known to be `num_samples`."""
    if response_format == "pcm":
        return np.frombuffer(content, np.int16)
    if response_format == "flac":
        # A FLAC stream declares no length. Other decoders accept that; libsndfile needs the length in the header.
        assert content[21] & 0x0F == 0
        assert content[22:26] == bytes(4)
        content = content[:22] + num_samples.to_bytes(4, "big") + content[26:]
    return soundfile.read(io.BytesIO(content), dtype="int16")[0]


def test_default_format_is_mp3_that_can_be_concatenated(client):
    audio = client.audio.speech.create(model="tts-1", voice="nova", input=TEXT).read()
    assert audio[0] == 0xFF
    assert audio[1] & 0xE0 == 0xE0
    assert not any(tag in audio[:2000] for tag in (b"ID3", b"Xing", b"Info"))
    single, double = (len(soundfile.read(io.BytesIO(content))[0]) for content in (audio, audio + audio))
    assert double == 2 * single


def test_wav_stream_declares_an_unknown_length(client):
    audio = client.audio.speech.create(model="m", voice="nova", input=TEXT, response_format="wav").read()
    assert audio[4:8] == audio[40:44] == b"\xff\xff\xff\xff"


def test_events_have_openais_format(client):
    with client.audio.speech.with_streaming_response.create(
        model="tts", voice="nova", input=TEXT, response_format="pcm", stream_format="sse"
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == fake_pcm({"id": "x", "text": TEXT})
    assert done["type"] == "speech.audio.done"
    assert done["usage"] == {"input_tokens": 14, "output_tokens": 122, "total_tokens": 136}


@pytest.mark.parametrize("speed", [0.5, 1.25, 4.0])
def test_speed_changes_duration_but_not_pitch(client, speed):
    def spectral_peak_hz(pcm):
        samples = np.frombuffer(pcm, np.int16)[4800:-4800].astype(float)
        return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * 24_000 / len(samples)

    normal, stretched = (
        client.audio.speech.create(model="m", voice="nova", input=TEXT * 3, response_format="pcm", speed=value).read()
        for value in (1.0, speed)
    )
    assert len(stretched) == pytest.approx(len(normal) / speed, rel=1e-3)
    assert spectral_peak_hz(stretched) == pytest.approx(spectral_peak_hz(normal), rel=0.02)


def test_unknown_fields_are_ignored(server):
    body = {"input": "Hello.", "model": None, "voice": {"id": "ann"}, "user": "x", "stream": True, "speed": None}
    assert send_request(server.url, "/v1/audio/speech", body)[0] == 200
    # The content type that `curl -d` sends by default.
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert send_request(server.url, "/v1/audio/speech", {"input": "Hello."}, headers)[0] == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
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
def test_invalid_request_is_refused_with_its_field(server, body, param, message):
    status, headers, response = send_request(server.url, "/v1/audio/speech", body)
    error = json.loads(response)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert message in error["message"]
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
def test_errors_have_openais_format(server, method, path, status, code):
    actual_status, _, response = send_request(server.url, path, method=method)
    assert (actual_status, json.loads(response)["error"]["code"]) == (status, code)


def test_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="no voice 'anne'") as caught:
        client.audio.speech.create(model="m", voice="anne", input=TEXT)
    assert caught.value.code == "invalid_request"


def test_special_tokens_in_text_are_literal(server):
    text = "<|audio_out_bos|> <|end_of_text|> Hello."
    status, _, _ = send_request(server.url, "/v1/audio/speech", {"input": text, "response_format": "pcm"})
    assert status == 200
    assert server.backend.requests[-1].row["text"] == text


def test_reference_may_be_base64_a_data_uri_or_a_file(server):
    content = recording(3.0, file_format="FLAC")
    encoded = base64.b64encode(content).decode()
    for value in (encoded, f"data:audio/flac;base64,{encoded}"):
        body = {"input": "Hello.", "ref_audio": value, "ref_text": "What it says, word by word, and more."}
        status, _, _ = send_request(server.url, "/v1/audio/speech", body)
        assert status == 200
        assert server.backend.requests[-1].reference == content
    body, content_type = multipart({"input": "Hello.", "seed": "7", "speed": "1.5"}, {"ref_audio": content})
    status, _, _ = send_request(server.url, "/v1/audio/speech", body, {"content-type": content_type})
    assert status == 200
    request = server.backend.requests[-1]
    assert (request.reference, request.row["seed"], request.row["ref_audio"]) == (content, 7, "ref_audio")


def multipart(fields, files):
    """Return the body and content type of a multipart form."""
    boundary = "boundary-of-parts"
    parts = []
    for name, value in fields.items():
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, content in files.items():
        part_headers = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="../../x.wav"\r\n\r\n'
        parts.append(part_headers.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
