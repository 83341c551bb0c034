"""Errors of jobs that cannot start are reported in one line, before anything starts."""

import pytest

from jobs.synthesize.cli import main

ROW = b'{"id": "x", "text": "Hello."}\n'


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, (), "does not exist"),
        (b"", (), "no rows"),
        (b"\n\n", (), "no rows"),
        (b'{"name": "x"}\n', (), "needs the columns id"),
        (ROW, ("--output", "ftp://there"), "ftp://there"),
        (ROW, ("--voices", "/nowhere"), "/nowhere"),
        (ROW, ("--lexicon", "/nowhere"), "/nowhere"),
        (ROW, ("--model", "/nowhere"), "/nowhere"),
        (ROW, ("--max-batch", "0"), "max-batch"),
        (ROW, ("--max-failed", "many"), "max-failed"),
        (ROW, ("--format", "opus", "--sample-rate", "44100"), "44100"),
        (ROW, ("--format", "aiff"), "aiff"),
        (ROW, ("--no-such-flag",), "no-such-flag"),
        (ROW, ("--check", "json:loudness"), "json:loudness"),
        (ROW, ("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
)
def test_invalid_job_is_reported_in_one_line(tmp_path, monkeypatch, capsys, content, arguments, message):
    # With a cluster, paths are not checked here, because they need to exist only on its machines.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if content is not None:
        (tmp_path / "m.jsonl").write_bytes(content)
    status = main(["--manifest", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out"), *arguments])
    stdout, stderr = capsys.readouterr()
    assert status == 2
    assert stdout == ""
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
