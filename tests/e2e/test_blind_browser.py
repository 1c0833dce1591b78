"""The blind page in a real browser: keys, taps, one back, a reload, and the file that it gives. Skipped without one."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from decant.report.blind_page import write_blind
from decant.stages.blind import preferences, write_key

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)
ARMS = ["teacher at 30 steps", "tiny at 2 steps", "tiny at 4 steps"]


class Browser:
    """One tab of Chromium, told what to do by its debugging pipe."""

    def __init__(self, home: Path) -> None:
        assert CHROMIUM
        (read, self._told), (self._said, write) = os.pipe(), os.pipe()
        words = [CHROMIUM, *QUIET.split(), "--disable-sync", "--remote-debugging-pipe", f"--user-data-dir={home}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *words]
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen(shell, pass_fds=(read, write), stdout=nowhere, stderr=nowhere)
        os.close(read)
        os.close(write)
        self._number, self._rest, self.events = 0, b"", list[dict[str, Any]]()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What it answers to a command of its protocol."""
        self._number += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._told, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._said, 1 << 16)
                assert part, "the browser ended"
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, script: str) -> Any:
        """Of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, page: Path) -> None:
        self.ask("Page.navigate", url=page.as_uri())
        ready = "new Promise(r => document.readyState === 'complete' ? r() : addEventListener('load', () => r()))"
        self.value(ready)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    found = Browser(tmp_path / "home")
    yield found
    found.close()


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """The finished comparison of three arms on three prompts, in plain colours."""
    out, rows = tmp_path / "out", []
    for number in range(3):
        row: dict[str, Any] = {"caption": f"prompt {number} </script>", "seed": number, "models": {}}
        for place, arm in enumerate(ARMS):
            file = out / "pictures" / str(place) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 40 * place + number, np.uint8)).save(file)
            row["models"][arm] = {"file": file.relative_to(out).as_posix()}
        rows.append(row)
    models = [{"name": arm, "role": "student" if place else "teacher"} for place, arm in enumerate(ARMS)]
    (out / "compare.json").write_text(json.dumps({"seed": 1, "models": models, "pictures": rows}))
    return out


def test_a_person_votes_by_keys_and_taps(browser: Browser, compared: Path, tmp_path: Path) -> None:
    """The voter takes the darker picture, which is the teacher's, but for one tie and one pair thought over."""
    key = write_key(compared, 6)
    page = write_blind(compared)
    for domain in ("Page", "Log", "Runtime"):
        browser.ask(f"{domain}.enable")
    browser.open(page)
    darker = ["right" if pair["side"] == "left" else "left" for pair in key["pairs"]]
    arrows = {"left": "ArrowLeft", "right": "ArrowRight"}
    assert browser.value("document.getElementById('prompt').textContent").startswith("prompt ")
    browser.key("ArrowDown")
    browser.key(arrows[{"left": "right", "right": "left"}[darker[1]]])
    browser.key("Backspace")
    browser.key(arrows[darker[1]])
    browser.value(f"document.getElementById('{darker[2]}').click()")
    browser.value(f"document.getElementById('{darker[3]}-better').click()")
    assert browser.value("document.getElementById('count').textContent") == "4 of 6"
    browser.open(page)
    assert browser.value("document.getElementById('count').textContent") == "4 of 6", "a reload forgets nothing"
    for side in darker[4:]:
        browser.key(arrows[side])
    assert browser.value("document.getElementById('voting').hidden")
    browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    browser.value("document.getElementById('save').click()")
    for _ in range(200):
        if (tmp_path / "votes.json").is_file() and (tmp_path / "votes.json").stat().st_size:
            break
        browser.value("new Promise(done => setTimeout(done, 50))")
    votes = json.loads((tmp_path / "votes.json").read_text())
    assert votes == json.loads(browser.value("document.getElementById('text').value"))
    assert [vote["choice"] for vote in votes["votes"]] == ["tie", *darker[1:]]
    found = preferences(compared, [tmp_path / "votes.json"])
    counted = [(arm["wins"], arm["losses"] + arm["ties"]) for arm in found["arms"]]
    assert counted == [(0, 3), (0, 3)] and sum(arm["ties"] for arm in found["arms"]) == 1
    wrong = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event.get("method") in wrong] == []


@pytest.mark.parametrize("width", [360, 1280])
def test_both_pictures_and_all_buttons_fit_the_screen(browser: Browser, compared: Path, width: int) -> None:
    write_key(compared, 6)
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=720, deviceScaleFactor=1, mobile=width < 500)
    browser.open(write_blind(compared))
    assert browser.value("document.documentElement.scrollWidth") <= width
    for name in ("left", "right", "left-better", "tie", "right-better"):
        box = browser.value(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= width and box["bottom"] <= 720 and box["height"] >= 40, name
