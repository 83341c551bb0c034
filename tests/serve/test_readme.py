"""The examples of serve/README.md are run, and the Serve config file is validated."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import soundfile
import yaml

from serve.deployments.settings import EndpointSettings, resolve_config
from tests.serve.conftest import recording

ROOT = Path(__file__).parents[2]
README = (ROOT / "serve" / "README.md").read_text()


@pytest.fixture(scope="module")
def server_and_folder(start_server, tmp_path_factory):
    """A server with the README's voice, and a working directory with the README's recording."""
    folder, voices = tmp_path_factory.mktemp("readme"), tmp_path_factory.mktemp("voices")
    (folder / "carl.wav").write_bytes(recording())
    (voices / "belinda.wav").write_bytes(recording())
    return start_server(voices=str(voices), default_voice="belinda"), folder


def test_curl_commands_work(server_and_folder):
    server, folder = server_and_folder
    commands = [line for line in README.splitlines() if line.startswith("curl ")]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
        subprocess.run([*words, "--fail", "--silent", "--show-error"], cwd=folder, check=True, capture_output=True)
    assert soundfile.info(folder / "hello.wav").samplerate == 24_000
    assert [len(chunk["speakers"]) for chunk in json.loads((folder / "dialogue.json").read_text())["chunks"]] == [1, 1]
    assert soundfile.info(folder / "like-carl.mp3").format == "MP3"


def test_python_example_works(server_and_folder):
    server, _ = server_and_folder
    namespace = {}
    (code,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "README", "exec"), namespace)
    assert server.backend.requests[-1].row["text"] == "It arrives while it is generated."
    assert any(namespace["part"])


def test_documented_settings_exist():
    (command,) = re.findall(r"^serve run serve\.app:app (.*)$", README, re.MULTILINE)
    resolve_config(dict(word.split("=", 1) for word in command.split()))
    table = README[README.index("| setting | description |") :]
    documented = {
        name for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall(r"`([a-z_]+)`", row)
    }
    assert documented
    assert documented <= set(EndpointSettings.model_fields)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_config_file_is_valid():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "infra/serve_config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    resolve_config(application.args)
    assert application.import_path == "serve.app:app"
