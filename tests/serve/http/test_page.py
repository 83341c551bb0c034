"""The web page in a real browser, including its audio output. `make browser` installs Debian's Chromium."""

import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from higgs_model.synthesizer.fake import FakeSynthesizer
from tests.serve.conftest import recording
from tests.serve.speech.test_speech import fake_pcm

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="chromium or chromedriver not found; `make browser` installs them"
    ),
    # selenium and chromedriver close their sockets only when they are garbage-collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SCRIPT = "[SPEAKER0] Good morning, did you sleep well?\n[SPEAKER1] Well enough, thank you for asking."


@pytest.fixture(scope="module")
def page_server(start_server, tmp_path_factory):
    return start_server(FakeSynthesizer(pace=0.05), voices=str(tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,1100"),
        *("--autoplay-policy=no-user-gesture-required", "--disable-background-networking", "--no-proxy-server"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path_factory.mktemp("saved"))})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_page_plays_generated_audio(browser, page_server, tmp_path):
    browser.get(page_server.url)
    wait = WebDriverWait(browser, 20, 0.05)
    wait.until(lambda b: b.find_element(By.ID, "health").text == "ready")

    # Add a voice, which the page then selects.
    file = tmp_path / "carla.wav"
    file.write_bytes(recording())
    for summary in browser.find_elements(By.TAG_NAME, "summary"):
        summary.click()
    for name, value in {"name": "carla", "file": str(file), "consent": "Carla agreed."}.items():
        browser.find_element(By.ID, name).send_keys(value)
    browser.find_element(By.ID, "upload").click()
    wait.until(lambda b: "Added carla" in b.find_element(By.ID, "added").text)
    assert browser.execute_script("return document.getElementById('voice').value") == "carla"

    text = browser.find_element(By.ID, "text")
    text.clear()
    text.send_keys(SCRIPT)
    browser.find_element(By.ID, "go").click()
    # Measure the level at the node that feeds the loudspeaker, while the stream is still arriving.
    read_peak = """
        const meter = window.higgs.meter; if (!meter) return 0;
        const samples = new Float32Array(meter.fftSize); meter.getFloatTimeDomainData(samples);
        return Math.max(...samples.map(Math.abs));
    """
    level = wait.until(lambda b: (peak := b.execute_script(read_peak)) > 0.05 and peak)
    assert level < 1
    wait.until(lambda b: not b.find_element(By.ID, "save").get_attribute("hidden"))

    parts = browser.execute_script("return window.higgs.samples.map(part => Array.from(part))")
    samples = np.concatenate([np.asarray(part, np.float32) for part in parts])
    expected = np.frombuffer(fake_pcm({"id": "x", "text": SCRIPT, "seed": 0}), np.int16)
    np.testing.assert_array_equal(np.rint(samples * 32768).astype(np.int16), expected)
    assert page_server.backend.requests[-1].row["voices"] == {"SPEAKER0": "carla"}
    chunks = browser.execute_script("return window.higgs.chunks")
    assert [chunk["index"] for chunk in chunks] == [0, 1]
    assert [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#said span")] == [c["text"] for c in chunks]
    drawn_share = browser.execute_script("""
        const canvas = document.getElementById("wave");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0; for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 0;
        return count / (pixels.length / 4);
    """)
    assert 0.01 < drawn_share < 0.9
    errors = [
        line for line in browser.get_log("browser") if line["level"] == "SEVERE" and "favicon" not in line["message"]
    ]
    assert errors == []


def test_stop_frees_the_slot(browser, page_server):
    browser.get(page_server.url)
    text = browser.find_element(By.ID, "text")
    text.clear()
    text.send_keys("This goes on for a while. " * 40)
    browser.find_element(By.ID, "go").click()
    wait = WebDriverWait(browser, 20, 0.05)
    wait.until(lambda b: b.execute_script("return window.higgs.total") > 0)
    assert page_server.backend.running == 1
    browser.find_element(By.ID, "stop").click()
    wait.until(lambda _: page_server.backend.running == 0)


def test_error_is_shown(browser, page_server):
    browser.get(page_server.url)
    browser.find_element(By.ID, "text").clear()
    browser.execute_script("document.getElementById('text').value = '[pause:1s]'")
    browser.find_element(By.ID, "go").click()
    status = browser.find_element(By.ID, "status")
    WebDriverWait(browser, 20).until(lambda _: status.get_attribute("class") == "bad")
    assert "nothing" in status.text


@pytest.mark.parametrize("response_format", ["wav", "flac", "mp3", "opus"])
def test_browser_decodes_every_format(browser, page_server, response_format):
    browser.get(page_server.url)
    duration_s = browser.execute_async_script(
        """
        const [format, done] = arguments;
        const body = JSON.stringify({ input: "Hello there, how are you?", response_format: format });
        fetch("v1/audio/speech", { method: "POST", body })
          .then(response => response.arrayBuffer())
          .then(content => new OfflineAudioContext(1, 1, 24000).decodeAudioData(content))
          .then(buffer => done(buffer.duration), error => done(String(error)));
        """,
        response_format,
    )
    expected_s = len(fake_pcm({"id": "x", "text": "Hello there, how are you?"})) / 2 / 24_000
    assert duration_s == pytest.approx(expected_s, abs=0.1)
