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
from tests.serve.speech.test_speech import ask
from tests.serve.voices.test_voices import listed, upload

LIMITS = ReferenceLimits(1 << 20, 10.0)


# ---------------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def locked(serve_local, tmp_path_factory):
    return serve_local(keys=("correct horse", "battery staple"), voices=str(tmp_path_factory.mktemp("locked")))


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
@pytest.mark.parametrize("given_key", [None, "Bearer wrong", "Bearer ", "Basic correct horse", "Bearer correct hors"])
def test_requests_without_a_valid_key_are_refused(locked, method, path, given_key):
    headers = {} if given_key is None else {"authorization": given_key}
    status, told, body = ask(locked.url, path, {"input": "Hello."} if method == "POST" else None, headers, method)
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert told["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["correct horse", "battery staple"])
def test_requests_with_a_key_succeed(locked, key):
    headers = {"authorization": f"Bearer {key}"}
    assert ask(locked.url, "/v1/audio/speech", {"input": "Hello."}, headers)[0] == 200
    assert upload(locked.url, key.replace(" ", "-"), headers=headers)[0] == 201


@pytest.mark.parametrize("path", ["/v1/audio/voices", "/healthz", "/", "/openapi.json"])
def test_public_paths_need_no_key(locked, path):
    assert ask(locked.url, path)[0] == 200


# ---------------------------------------------------------------------- errors


def test_every_error_is_documented_with_a_status_of_its_own():
    leaves = ApiError.__subclasses__()
    assert set(leaves) == set(errors.ERROR_TYPES)
    assert len({leaf.status for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert f"{leaf.__name__:<18}{leaf.status}" in errors.__doc__
        body = leaf("what", param="where").body()["error"]
        assert body == {"message": "what", "type": leaf.kind, "param": "where", "code": leaf.code}


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
    samples, rate = soundfile.read(io.BytesIO(checked.flac()))
    assert (len(samples), rate) == (len(checked.samples_N), 48_000)
    np.testing.assert_allclose(samples, checked.samples_N, atol=1 / 32768)


def wav(channels=1, rate=24_000, declared=None, content=bytes(48_000)):
    declared = len(content) if declared is None else declared
    head = struct.pack(
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
    return head + content


def flac_that_lies(declared):
    """A small file with fifty seconds of silence whose header declares another number of samples."""
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
        flac_that_lies(50 * 24_000),
        flac_that_lies(0),
        flac_that_lies(2**36 - 1),
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
        checked = check_reference(flac_that_lies(24_000), LIMITS)
    except BadRequest:
        return
    assert checked.duration_s <= LIMITS.max_s


@settings(max_examples=150)
@given(data=st.data(), base=st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]))
def test_damaged_recordings_are_refused_or_decoded(data, base):
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(base, "PCM_16")
    content = bytearray(recording(0.5, 16_000, 1, base, subtype))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content) - 1, 200)))
        content[at] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checked = check_reference(cut, LIMITS)
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
    plain = base64.b64encode(content).decode()
    assert decode_reference(plain, LIMITS) == decode_reference(f"data:audio/wav;base64,{plain}", LIMITS) == content


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
        raise AssertionError("asked")

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
        raise AssertionError("called")

    for found in ([address], ["93.184.216.34", address]):
        downloader = ReferenceDownloader([PREFIX], 1000, resolve=lambda host, port, found=found: found, connect=connect)
        with pytest.raises(BadRequest, match="does not resolve to a public address"):
            downloader.download(PREFIX + "a.wav")


def test_is_public():
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")


class Plain:
    """Stands in for TLS, because tests have no certificates."""

    def __init__(self):
        self.names = []

    def wrap_socket(self, sock, server_hostname):
        self.names.append(server_hostname)
        return sock


@pytest.fixture(scope="module")
def web():
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


def test_allowed_url_is_downloaded_from_the_checked_address(web):
    """DNS rebinding has no effect, because the name is looked up only once."""
    answers, called, tls = iter([["93.184.216.34"], ["127.0.0.1"]]), [], Plain()

    def connect(address, port, timeout_s):
        called.append((address, port))
        return socket.create_connection(("127.0.0.1", web), timeout_s)

    def downloader(resolve):
        context = ssl.create_default_context()
        context.wrap_socket = tls.wrap_socket
        return ReferenceDownloader([PREFIX], 60_000, resolve=resolve, connect=connect, tls=context)

    found = downloader(lambda host, port: next(answers)).download(PREFIX + "a.wav")
    assert found == recording(1.0)
    assert called == [("93.184.216.34", 443)]
    assert tls.names == ["voices.example.org"]
    always = downloader(lambda host, port: ["93.184.216.34"])
    with pytest.raises(BadRequest, match="status 302; redirects are not followed"):
        always.download(PREFIX + "moved.wav")
    with pytest.raises(PayloadTooLarge):
        always.download(PREFIX + "large.wav")


def test_page_loads_nothing_from_other_hosts(locked):
    assert listed(locked.url) is not None
    _, headers, page = ask(locked.url, "/")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page
