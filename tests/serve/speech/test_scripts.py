"""Script requests over HTTP: manifest rows, chunk times, and events."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile

from tests.serve.conftest import recording
from tests.serve.speech.test_speech import fake_pcm, multipart, send_request

ROW = {
    "id": "dialogue",
    "turns": [
        {"speaker": "Ann", "text": "Good morning, did you sleep well?"},
        {"speaker": "Bob", "text": "Well enough, thank you for asking."},
        {"speaker": "Ann", "text": "Then let us begin."},
    ],
    "voices": {"Ann": "ann", "Bob": "profile:deep"},
    "seed": 5,
    "response_format": "pcm",
}


def test_row_has_the_samples_of_a_batch_job(server):
    status, headers, audio = send_request(server.url, "/v1/audio/scripts", ROW)
    assert status == 200
    assert headers["x-audio-chunks"] == "3"
    request = server.backend.requests[-1]
    assert request.live is False
    assert request.row["id"] == "dialogue"
    assert audio == fake_pcm({"id": "x", "seed": 5, "turns": ROW["turns"]} | {"voices": {"Ann": "a b", "Bob": "c d"}})


def test_json_response_contains_audio_and_chunk_times(server):
    status, _, response = send_request(
        server.url, "/v1/audio/scripts", ROW | {"response_format": "wav"}, {"accept": "application/json"}
    )
    assert status == 200
    result = json.loads(response)
    assert [chunk["speakers"] for chunk in result["chunks"]] == [["Ann"], ["Bob"], ["Ann"]]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(result["audio"])))
    assert rate == result["sample_rate"]
    assert len(samples) / rate == pytest.approx(result["duration_s"])
    assert result["chunks"][0]["start_s"] == 0
    assert result["chunks"][-1]["end_s"] == pytest.approx(result["duration_s"])
    assert [(chunk["frames"], chunk["attempts"]) for chunk in result["chunks"]] == [(73, 1), (75, 1), (48, 1)]
    assert result["status"] == "ok"
    assert result["usage"]["output_tokens"] == 196


def test_events_report_finished_chunks(server):
    _, headers, response = send_request(
        server.url, "/v1/audio/scripts", ROW | {"stream_format": "sse", "live": True, "speed": 2}
    )
    assert headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in response.decode().splitlines() if line.startswith("data: ")]
    event_types = [event["type"] for event in events]
    assert event_types[0] == "speech.started"
    assert event_types[-1] == "speech.audio.done"
    assert event_types.count("speech.chunk.done") == 3
    samples = sum(
        len(base64.b64decode(event["audio"])) // 2 for event in events if event["type"] == "speech.audio.delta"
    )
    last_chunk = [event["chunk"] for event in events if event["type"] == "speech.chunk.done"][-1]
    assert last_chunk["end_s"] == pytest.approx(samples / 24_000, abs=0.001)


def test_row_and_reference_may_be_sent_as_a_form(server):
    row = {"text": "Hello there.", "ref_text": "What it says."}
    body, content_type = multipart({"script": json.dumps(row)}, {"ref_audio": recording(3.0)})
    status, headers, _ = send_request(server.url, "/v1/audio/scripts", body, {"content-type": content_type})
    assert status == 200
    request = server.backend.requests[-1]
    assert request.row["id"].startswith("req_")
    assert request.row["ref_text"] == "What it says."


@pytest.mark.parametrize(
    ("row", "param", "message"),
    [
        ({}, "text", "set text or turns"),
        ({"text": "x", "id": "../x"}, "id", "it becomes a file name"),
        ({"text": "x", "turns": [{"speaker": "A", "text": "y"}]}, "turns", "not both"),
        ({"text": "x", "voices": {"SPEAKER9": 3}}, "voices", "string"),
        ({"text": "x", "seed": "x"}, "seed", "integer"),
        ({"text": "x", "ref_audio": 3}, "ref_audio", "base64"),
        ({"text": "x", "ras_win_len": 1e99}, "ras_win_len", ""),
        ({"text": "\ud800"}, "text", ""),
        ({"text": "x" * 200_001}, "text", "200000"),
    ],
)
def test_invalid_row_is_refused_with_its_field(server, row, param, message):
    status, _, response = send_request(server.url, "/v1/audio/scripts", row)
    error = json.loads(response)["error"]
    assert (status, error["param"]) == (400, param), error
    assert message in error["message"]


def test_text_without_audio_is_an_error(start_server):
    from higgs_model.synthesizer.fake import FakeSynthesizer

    class Silent(FakeSynthesizer):
        async def stream(self, plan, **options):
            async for piece in super().stream(plan, **options):
                yield type(piece)(np.empty(0, np.float32), piece.chunk)

    server = start_server(Silent())
    status, _, response = send_request(server.url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 400
    assert "no audio was generated for this text" in json.loads(response)["error"]["message"]
