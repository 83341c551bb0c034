"""Scripts over HTTP: manifest rows, chunk times, and events."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile

from tests.serve.conftest import recording
from tests.serve.speech.test_speech import ask, fake_pcm, multipart

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
    status, headers, spoken = ask(server.url, "/v1/audio/scripts", ROW)
    assert status == 200
    assert headers["x-audio-chunks"] == "3"
    job = server.backend.requests[-1]
    assert job.live is False
    assert job.row["id"] == "dialogue"
    assert spoken == fake_pcm({"id": "x", "seed": 5, "turns": ROW["turns"]} | {"voices": {"Ann": "a b", "Bob": "c d"}})


def test_json_contains_audio_and_chunk_times(server):
    status, _, answer = ask(
        server.url, "/v1/audio/scripts", ROW | {"response_format": "wav"}, {"accept": "application/json"}
    )
    assert status == 200
    told = json.loads(answer)
    assert [chunk["speakers"] for chunk in told["chunks"]] == [["Ann"], ["Bob"], ["Ann"]]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(told["audio"])))
    assert rate == told["sample_rate"]
    assert len(samples) / rate == pytest.approx(told["duration_s"])
    assert told["chunks"][0]["start_s"] == 0
    assert told["chunks"][-1]["end_s"] == pytest.approx(told["duration_s"])
    assert [(chunk["frames"], chunk["attempts"]) for chunk in told["chunks"]] == [(73, 1), (75, 1), (48, 1)]
    assert told["status"] == "ok"
    assert told["usage"]["output_tokens"] == 196


def test_events_report_finished_chunks(server):
    _, headers, answer = ask(server.url, "/v1/audio/scripts", ROW | {"stream_format": "sse", "live": True, "speed": 2})
    assert headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: ")]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "speech.started"
    assert kinds[-1] == "speech.audio.done"
    assert kinds.count("speech.chunk.done") == 3
    samples = sum(
        len(base64.b64decode(event["audio"])) // 2 for event in events if event["type"] == "speech.audio.delta"
    )
    last = [event["chunk"] for event in events if event["type"] == "speech.chunk.done"][-1]
    assert last["end_s"] == pytest.approx(samples / 24_000, abs=0.001)


def test_row_may_be_a_form_with_its_reference(server):
    row = {"text": "Hello there.", "ref_text": "What it says."}
    body, kind = multipart({"script": json.dumps(row)}, {"ref_audio": recording(3.0)})
    status, headers, _ = ask(server.url, "/v1/audio/scripts", body, {"content-type": kind})
    assert status == 200
    job = server.backend.requests[-1]
    assert job.row["id"].startswith("req_")
    assert job.row["ref_text"] == "What it says."


@pytest.mark.parametrize(
    ("row", "param", "words"),
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
def test_invalid_row_lists_its_errors(server, row, param, words):
    status, _, answer = ask(server.url, "/v1/audio/scripts", row)
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"]


def test_text_without_audio_is_an_error(serve_local):
    from higgs_model.synthesizer.fake import FakeSynthesizer

    class Silent(FakeSynthesizer):
        async def stream(self, plan, **options):
            async for piece in super().stream(plan, **options):
                yield piece.__class__(np.empty(0, np.float32), piece.chunk)

    silent = serve_local(Silent())
    status, _, answer = ask(silent.url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 400
    assert "no audio was generated for this text" in json.loads(answer)["error"]["message"]
