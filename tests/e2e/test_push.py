"""--push-to-hub against a stand-in of the hub on this machine, which really receives the commit."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from decant.scenes.folder import draw_folder

RECIPE = "name: cut-only\nstages: [{stage: prune, name: cut, settings: {student: bk-tiny}}]\n"
TOKEN = "hf_standin"


@dataclass
class Hub:
    """What the stand-in was told; ``broken``: it answers every commit with an error."""

    endpoint: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    message: str = ""
    tokens: set[str | None] = field(default_factory=set)
    broken: bool = False


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def answer(self, status: int, document: Any) -> None:
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.answer(200, {"id": "me/student", "sha": "0" * 40, "siblings": [], "name": "me", "type": "user"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.tokens.add(self.headers.get("Authorization"))
            if self.path.endswith("/repos/create"):
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                state.repositories[name] = asked.get("private") or asked.get("visibility") == "private"
                self.answer(200, {"url": f"{state.endpoint}/{name}", "id": name})
            elif "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
            elif "/commit/" in self.path:
                self.commit(body)
            else:
                self.answer(200, {"errors": [], "warnings": []})

        def commit(self, body: bytes) -> None:
            if state.broken:
                self.answer(403, {"error": "you may not write here"})
                return
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    state.message = entry["value"]["summary"]
                else:
                    state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{state.endpoint}/me/student/commit/{'1' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "1" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()


def run(tmp_path: Path, hub: Hub | None, repository: str, **environment: str) -> subprocess.CompletedProcess[str]:
    recipe, data = tmp_path / "cut.yaml", tmp_path / "data"
    recipe.write_text(RECIPE)
    if not data.exists():
        draw_folder(data, 2, "train")
    words = ["run", recipe, "--teacher", "scenes", "--out", tmp_path / "run", "--push-to-hub", repository]
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    places = {"HF_ENDPOINT": hub.endpoint} if hub else {}
    return subprocess.run(
        [sys.executable, "-m", "decant.cli.main", *map(str, words), "--json"],
        env={**known, "HF_HOME": str(tmp_path / "home"), **places, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_student_is_pushed_whole_and_a_failure_costs_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    failed = run(tmp_path, hub, "me/student", HF_TOKEN=TOKEN)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "nothing is lost" in failed.stderr and TOKEN not in failed.stderr
    student = contents(tmp_path / "run" / "01-cut")
    assert "README.md" in student and not hub.files
    hub.broken = False
    done = run(tmp_path, hub, "me/student", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "reused" in done.stderr and contents(tmp_path / "run" / "01-cut") == student
    assert json.loads(done.stdout)["pushed"] == f"{hub.endpoint}/me/student"
    assert hub.files == student
    assert hub.repositories == {"me/student": True} and hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.slow
def test_what_cannot_be_pushed_is_refused_before_the_run(hub: Hub, tmp_path: Path) -> None:
    without = run(tmp_path, hub, "me/student")
    assert without.returncode == 2 and "hf auth login" in without.stderr and "HF_TOKEN" in without.stderr
    offline = run(tmp_path, hub, "me/student", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE" in offline.stderr
    nameless = run(tmp_path, hub, "student", HF_TOKEN=TOKEN)
    assert nameless.returncode == 2 and "owner/name" in nameless.stderr
    assert not (tmp_path / "run").exists() and not hub.tokens
