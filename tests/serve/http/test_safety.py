"""Security: API keys, voice names, malicious recordings, and server-side request forgery."""

import base64
import contextlib
import http.server
import io
import json
import socket
import ssl
import struct
import threading

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.http import errors
from serve.http.errors import ApiError, BadRequest, PayloadTooLarge
from serve.voices.reference_audio import ReferenceLimits, check_reference, decode_reference
from serve.voices.reference_download import ReferenceDownloader, is_public
from tests.serve.conftest import recording
from tests.serve.speech.test_speech import send_request
from tests.serve.voices.test_voices import list_voice_ids, upload_voice

LIMITS = ReferenceLimits(1 << 20, 10.0)


# ---------------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def protected_server(start_server, tmp_path_factory):
    return start_server(keys=("correct horse", "battery staple"), voices=str(tmp_path_factory.mktemp("protected")))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/audio/scripts"),
        ("POST", "/v1/audio/voices"),
        ("DELETE", "/v1/audio/voices/ann"),
        ("GET", "/v1/models"),
    ],
)
@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", "Bearer ", "Basic correct horse", "Bearer correct hors"]
)
def test_requests_without_a_valid_key_are_refused(protected_server, method, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    status, response_headers, body = send_request(
        protected_server.url, path, {"input": "Hello."} if method == "POST" else None, headers, method
    )
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert response_headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["correct horse", "battery staple"])
def test_requests_with_a_valid_key_succeed(protected_server, key):
    headers = {"authorization": f"Bearer {key}"}
    assert send_request(protected_server.url, "/v1/audio/speech", {"input": "Hello."}, headers)[0] == 200
    assert upload_voice(protected_server.url, key.replace(" ", "-"), headers=headers)[0] == 201


@pytest.mark.parametrize("path", ["/v1/audio/voices", "/healthz", "/", "/openapi.json"])
def test_public_paths_need_no_key(protected_server, path):
    assert send_request(protected_server.url, path)[0] == 200


# ---------------------------------------------------------------------- errors


def test_every_error_type_is_documented_with_a_unique_status():
    error_types = ApiError.__subclasses__()
    assert set(error_types) == set(errors.ERROR_TYPES)
    assert len({error_type.status for error_type in error_types}) == len(error_types)
    for error_type in error_types:
        assert f"{error_type.__name__:<21}{error_type.status}" in errors.__doc__
        body = error_type("what", param="where").body()["error"]
        assert body == {"message": "what", "type": error_type.kind, "param": "where", "code": error_type.code}


# ---------------------------------------------------------------------- recordings


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_common_recordings_are_accepted(file_format, subtype):
    checked = check_reference(recording(2.0, 48_000, 2, file_format, subtype), LIMITS)
    assert checked.duration_s == pytest.approx(2.0, abs=0.1)
    samples, rate = soundfile.read(io.BytesIO(checked.to_flac()))
    assert (len(samples), rate) == (len(checked.samples_N), 48_000)
    np.testing.assert_allclose(samples, checked.samples_N, atol=1 / 32768)


def wav(channels=1, rate=24_000, declared=None, content=bytes(48_000)):
    """Return a WAV file whose header declares `declared` bytes of samples (default: their actual number)."""
    declared = len(content) if declared is None else declared
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + declared,
        b"WAVE",
        b"fmt ",
        16,
        1,
        channels,
        rate,
        rate * channels * 2 & 0xFFFFFFFF,
        channels * 2 & 0xFFFF,
        16,
        b"data",
        declared,
    )
    return header + content


def flac_with_declared_length(declared):
    """Return a small FLAC file with 50 s of silence whose header declares `declared` samples."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(50 * 24_000, np.int16), 24_000, format="FLAC", subtype="PCM_16")
    content = bytearray(file.getvalue())
    content[21] = content[21] & 0xF0 | declared >> 32
    content[22:26] = (declared & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"/etc/passwd",
        wav(channels=0),
        wav(channels=1000),
        wav(rate=0),
        wav(rate=2_000_000_000),
        wav(content=b""),
        wav(content=bytes(2_000)),
        wav(content=bytes(500_000)),
        flac_with_declared_length(50 * 24_000),
        flac_with_declared_length(0),
        flac_with_declared_length(2**36 - 1),
        recording(4.0, subtype="FLOAT")[:44] + np.full(24_000, np.nan, np.float32).tobytes(),
        recording()[:60],
        bytes(2 << 20),
    ],
)
def test_malicious_recordings_are_refused(content):
    with pytest.raises((BadRequest, PayloadTooLarge)):
        check_reference(content, LIMITS)


def test_decoding_stops_at_the_declared_length():
    try:
        checked = check_reference(flac_with_declared_length(24_000), LIMITS)
    except BadRequest:
        return
    assert checked.duration_s <= LIMITS.max_s


@settings(max_examples=150)
@given(data=st.data(), file_format=st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]))
def test_damaged_recordings_are_refused_or_decoded(data, file_format):
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(file_format, "PCM_16")
    content = bytearray(recording(0.5, 16_000, 1, file_format, subtype))
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, min(len(content) - 1, 200)))
        content[position] = data.draw(st.integers(0, 255))
    truncated = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checked = check_reference(truncated, LIMITS)
    except (BadRequest, PayloadTooLarge):
        return
    assert 0.2 <= checked.duration_s <= LIMITS.max_s
    assert np.isfinite(checked.samples_N).all()


@given(st.text(max_size=200))
def test_any_text_decodes_or_is_a_bad_request(text):
    with contextlib.suppress(BadRequest, PayloadTooLarge):
        assert len(decode_reference(text, LIMITS)) <= len(text)


@given(st.binary(max_size=200))
def test_base64_round_trip(content):
    encoded = base64.b64encode(content).decode()
    assert decode_reference(encoded, LIMITS) == decode_reference(f"data:audio/wav;base64,{encoded}", LIMITS) == content


def test_base64_length_is_checked_before_decoding():
    with pytest.raises(PayloadTooLarge):
        decode_reference("A" * (LIMITS.max_bytes * 4 // 3 + 100), LIMITS)


# ---------------------------------------------------------------------- URLs

PREFIX = "https://voices.example.org/public/"


@pytest.mark.parametrize(
    "url",
    [
        "http://voices.example.org/public/a.wav",
        "https://voices.example.org/private/a.wav",
        "https://voices.example.org/public/../private/a.wav",
        "https://voices.example.org/public/%2e%2e/private/a.wav",
        "https://voices.example.org/public/%252e%252e/private/a.wav",
        "https://voices.example.org:8443/public/a.wav",
        "https://voices.example.org.evil.example/public/a.wav",
        "https://voices.example.org@evil.example/public/a.wav",
        "https://evil.example/https://voices.example.org/public/a.wav",
        "https://voices.example.org\\@evil.example/public/a.wav",
        "https://voices.example.org/public/a.wav\r\nHost: x",
        "https://voices.example.org:x/public/a.wav",
        "https://[::1/public/",
        "https://voices.example.org/publicly/a.wav",
        "ftp://voices.example.org/public/a.wav",
    ],
)
def test_urls_outside_the_allowed_prefixes_are_refused(url):
    def resolve(host, port):
        raise AssertionError("the name was resolved")

    with pytest.raises(BadRequest, match="this URL is not allowed"):
        ReferenceDownloader([PREFIX], 1000, resolve=resolve).download(url)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_private_addresses_are_not_contacted(address):
    assert not is_public(address)

    def connect(*_):
        raise AssertionError("the address was contacted")

    for addresses in ([address], ["93.184.216.34", address]):
        downloader = ReferenceDownloader(
            [PREFIX], 1000, resolve=lambda host, port, addresses=addresses: addresses, connect=connect
        )
        with pytest.raises(BadRequest, match="does not resolve to a public address"):
            downloader.download(PREFIX + "a.wav")


def test_public_addresses_are_recognized():
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")


class FakeTls:
    """Replaces TLS, because tests have no certificates."""

    def __init__(self):
        self.hostnames = []

    def wrap_socket(self, sock, server_hostname):
        self.hostnames.append(server_hostname)
        return sock


@pytest.fixture(scope="module")
def web_server_port():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith("/moved.wav"):
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1/secret")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(recording(1.0) if self.path.endswith("/a.wav") else bytes(100_000))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_allowed_url_is_downloaded_from_the_checked_address(web_server_port):
    """DNS rebinding has no effect, because the name is resolved only once."""
    lookups, contacted, tls = iter([["93.184.216.34"], ["127.0.0.1"]]), [], FakeTls()

    def connect(address, port, timeout_s):
        contacted.append((address, port))
        return socket.create_connection(("127.0.0.1", web_server_port), timeout_s)

    def downloader(resolve):
        context = ssl.create_default_context()
        context.wrap_socket = tls.wrap_socket
        return ReferenceDownloader([PREFIX], 60_000, resolve=resolve, connect=connect, tls=context)

    content = downloader(lambda host, port: next(lookups)).download(PREFIX + "a.wav")
    assert content == recording(1.0)
    assert contacted == [("93.184.216.34", 443)]
    assert tls.hostnames == ["voices.example.org"]
    public = downloader(lambda host, port: ["93.184.216.34"])
    with pytest.raises(BadRequest, match="status 302; redirects are not followed"):
        public.download(PREFIX + "moved.wav")
    with pytest.raises(PayloadTooLarge):
        public.download(PREFIX + "large.wav")


def test_page_loads_nothing_from_other_hosts(protected_server):
    assert list_voice_ids(protected_server.url) is not None
    _, headers, page = send_request(protected_server.url, "/")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page
